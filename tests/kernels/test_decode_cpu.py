"""The one-token step on the CPU: what it allocates, and that its short way agrees with the general one."""

import pytest
import torch
from nha_kernels import NHAState, core, log_decay_from_logits, nha_attention, nha_decode
from nha_kernels import chunked as chunked_path
from op_cases import EXACT, TOLERANCE, assert_close, case, cut, run
from torch.utils._python_dispatch import TorchDispatchMode

SIZES = {"window": 16, "sinks": 2}


class Allocated(TorchDispatchMode):
    """Counts operations, and bytes of every storage that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        self.calls += 1
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in known:
            self.bytes += out.untyped_storage().nbytes()
        return out


def step(x: dict[str, torch.Tensor], state: NHAState, **options) -> torch.Tensor:
    inputs = dict(x)
    log_decay = log_decay_from_logits(inputs.pop("logits"), 8.0)
    return nha_decode(inputs.pop("q"), inputs.pop("k"), inputs.pop("v"), log_decay, state, **inputs, **options)


def state_after(x: dict[str, torch.Tensor]) -> NHAState:
    inputs = dict(x)
    log_decay = log_decay_from_logits(inputs.pop("logits"), 8.0)
    q, k, v = (inputs.pop(name) for name in "qkv")
    return nha_attention(q, k, v, log_decay, output_final_state=True, **SIZES, **inputs)[1]


@pytest.mark.parametrize("batch", [1, 2])
def test_a_step_allocates_the_same_at_any_context(batch):
    x = case(5001, batch=batch, dtype=torch.float32)
    x = {name: y.float() for name, y in x.items()}
    spent = []
    for context in (100, 5000):
        state = state_after(cut(x, slice(0, context)))
        places = {name: y.data_ptr() for name, y in state.tensors().items()}
        with torch.no_grad(), Allocated() as count:
            step(cut(x, slice(context, context + 1)), state)
        assert {name: y.data_ptr() for name, y in state.tensors().items()} == places
        spent.append((count.bytes, count.calls))
    assert spent[0] == spent[1]
    held = sum(y.numel() * y.element_size() for y in state.tensors().values())
    assert 0 < spent[0][0] < 8 * held


@pytest.mark.parametrize("branch", ["both", "window", "slots"])
@pytest.mark.parametrize("window,sinks,rotary", [(16, 2, 16), (16, 0, 8), (0, 2, 16), (0, 0, 0), (5, 3, 0)])
def test_short_way_equals_general_way(window, sinks, rotary, branch):
    """A padding mask, even of real tokens only, takes the general way."""
    x = case(80, rotary=rotary)
    short = NHAState.new(2, 2, 8, 16, window=window, sinks=sinks, rotary_dim=rotary, dtype=EXACT)
    general = short.clone()
    real = torch.ones(2, 1, dtype=torch.bool)
    for t in range(80):
        token = cut(x, slice(t, t + 1))
        got, want = step(token, short, branch=branch), step(token, general, branch=branch, padding_mask=real)
        torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE[EXACT])
    for name, y in general.tensors().items():
        torch.testing.assert_close(short.tensors()[name], y, rtol=0, atol=TOLERANCE[EXACT])
    want, _ = nha_attention(
        x["q"], x["k"], x["v"], log_decay_from_logits(x["logits"], 8.0), window=window, sinks=sinks, branch=branch,
        **{name: x[name] for name in ("cos", "sin", "slot_q_scale", "slot_bias") if name in x}, backend="reference",
    )  # fmt: skip
    torch.testing.assert_close(got, want[:, -1:], rtol=0, atol=TOLERANCE[EXACT])


def test_long_calls_without_gradient_go_piece_by_piece(monkeypatch):
    """Pieces change nothing but rounding, with padding, with a state, and for the log of the denominator."""
    x = case(700, batch=3)
    inputs = {name: x[name] for name in ("cos", "sin", "slot_q_scale", "slot_bias")}
    tensors = (x["q"], x["k"], x["v"], log_decay_from_logits(x["logits"], 8.0))
    mask = torch.rand(3, 700, generator=torch.Generator().manual_seed(0)) < 0.8
    mask[1, :400] = False
    for padding in (None, mask):
        for kind in ("both", "window"):
            found = []
            for piece in (10**6, 96):
                monkeypatch.setattr(chunked_path, "PIECE", piece)
                options = {"padding_mask": padding, "branch": kind, "return_lse": True, "output_final_state": True}
                o, lse, state = nha_attention(*tensors, **SIZES, **inputs, **options, backend="torch")
                found.append({"o": o, "lse": lse.nan_to_num(neginf=0.0), **state.tensors()})
            for name, y in found[0].items():
                torch.testing.assert_close(found[1][name], y, rtol=0, atol=TOLERANCE[EXACT])


@pytest.mark.parametrize("window,sinks", [(70, 3), (5, 0), (0, 2), (600, 1)])
def test_without_fused_attention(window, sinks, monkeypatch):
    """The way other devices take; 600 exceeds the key block of the fused kernel."""
    x = case(650 if window == 600 else 150)
    options = {"window": window, "sinks": sinks, "backend": "torch"}
    want = run(x, EXACT, 8.0, **options)
    monkeypatch.setattr(core, "FUSED", ())
    assert_close(run(x, EXACT, 8.0, **options), want, TOLERANCE[EXACT])
