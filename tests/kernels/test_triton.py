"""The Triton kernels against the fp64 recurrence, forward and every gradient; interpreted where there is no GPU."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from nha_kernels import NHAState, log_decay_from_logits, nha_attention
from op_cases import EXACT, FLOAT, attend, case, cut
from same_dtype import output_and_gradients, same_dtype_attention
from triton_checks import padding, wrong

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("these tests run in Triton's interpreter", allow_module_level=True)
pytestmark = pytest.mark.usefixtures("poisoned")

SHAPES = [  # time, window, sinks, query heads per group, rotary dims, mask_empty, head_dim, slots
    (53, 5, 3, 2, 16, True, 16, 16),
    (34, 0, 0, 2, 0, False, 16, 16),
    (40, 0, 3, 1, 4, True, 16, 8),
    (70, 37, 4, 2, 8, True, 16, 24),
    (23, 50, 2, 2, 16, False, 16, 16),
    (3, 1, 0, 1, 16, True, 16, 16),
    (40, 9, 0, 7, 24, True, 24, 16),
    (36, 4, 17, 1, 96, True, 96, 16),
    (33, 3, 0, 1, 16, True, 16, 80),
]


@pytest.mark.parametrize("time,window,sinks,repeat,rotary,mask_empty,dim,slots", SHAPES)
def test_equals_recurrence(time, window, sinks, repeat, rotary, mask_empty, dim, slots):
    x = case(
        time, batch=1 if dim > 16 else 2, groups=1, repeat=repeat, rotary=rotary, dim=dim, slots=slots, dtype=FLOAT
    )
    assert not wrong(x, window=window, sinks=sinks, mask_empty=mask_empty)


@pytest.mark.parametrize("kind,tau", [("forget", 1.0), ("fade", 1.0), ("keep", 8.0), ("mixed", 1.0), ("mixed", 8.0)])
def test_extreme_gates(kind, tau):
    assert not wrong(case(71, batch=1, groups=1, kind=kind, dtype=FLOAT), tau, window=19, sinks=1)


def test_branches_without_learnables():
    x = case(41, batch=1, groups=1, dtype=FLOAT)
    for branch, mask_empty in (("window", True), ("slots", True), ("slots", False)):
        assert not wrong(x, window=11, sinks=2, branch=branch, mask_empty=mask_empty)


def test_padding():
    assert not wrong(case(38, groups=1, dtype=FLOAT), window=5, sinks=2, padding_mask=padding(38))


def test_packed_documents():
    ends = torch.tensor([0, 13, 13, 16, 50], dtype=torch.int32)
    assert not wrong(case(50, batch=1, dtype=FLOAT), window=7, sinks=2, cu_seqlens=ends)


@pytest.mark.parametrize("window,sinks,before", [(7, 2, 21), (9, 4, 3), (0, 0, 5)])
def test_goes_on_from_a_state(window, sinks, before):
    x = case(before + 26, groups=1, dtype=FLOAT)
    options = {"window": window, "sinks": sinks}
    _, state = attend(cut(x, slice(0, before)), output_final_state=True, backend="torch", **options)
    assert not wrong(cut(x, slice(before, None)), state=state, **options)


def test_padding_and_packing_go_on_from_a_state():
    options = {"window": 7, "sinks": 2}
    y = case(21, dtype=FLOAT, groups=1)
    late = torch.arange(21) >= torch.tensor([0, 20])[:, None]
    _, state = attend(y, output_final_state=True, backend="torch", padding_mask=late, **options)
    assert not wrong(case(38, groups=1, dtype=FLOAT), state=state, padding_mask=padding(38), **options)
    three = NHAState.cat([state, state.select(torch.tensor([0]))])
    ends = torch.tensor([0, 13, 13, 45], dtype=torch.int32)
    assert not wrong(case(45, batch=1, groups=1, dtype=FLOAT), state=three, cu_seqlens=ends, **options)


@pytest.mark.parametrize("segments", [2, 3])
def test_segmented_scan(segments, monkeypatch):
    """Scanning a document in pieces, side by side, gives what one scan gives; the last piece may be short."""
    from dataclasses import replace

    from nha_kernels import tile_call

    choose = tile_call.choose_tiling
    small = {"rows": 16, "keys": 16, "segments": segments}
    monkeypatch.setattr(tile_call, "choose_tiling", lambda *args: replace(choose(*args), **small))
    assert not wrong(case(70, batch=1, groups=1, dtype=FLOAT), window=5, sinks=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["normal", "mixed"])
def test_16_bit_error_is_within_twice_pytorchs(dtype, kind):
    """Root mean square error against fp64 over three draws, forward and gradients, beside PyTorch in the same dtype."""
    options, sums = {"window": 20, "sinks": 2}, {}
    for seed in range(3):
        x = case(80, batch=1, dim=64, slots=32, rotary=64, kind=kind, dtype=dtype, seed=seed)
        exact = ("slot_q_scale", "slot_bias")
        x = {n: y.float() if n in exact else y.to(dtype) for n, y in x.items()}
        x["log_decay"] = log_decay_from_logits(x.pop("logits").float(), 8.0)
        want = output_and_gradients(lambda **a: nha_attention(**a, **options, backend="torch")[0], x, EXACT)
        got = output_and_gradients(lambda **a: nha_attention(**a, **options, backend="triton")[0], x)
        plain = output_and_gradients(lambda **a: same_dtype_attention(**a, **options), x)
        for name, y in want.items():
            errors = [(z[name].double() - y).square().sum().item() for z in (got, plain)]
            sums[name] = [sum(pair) for pair in zip(errors, sums.get(name, [0.0, 0.0]))]
    ratios = {name: (ours / theirs) ** 0.5 for name, (ours, theirs) in sums.items()}
    assert max(ratios.values()) <= 2, ratios


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wide_window_is_softmax_attention(dtype):
    """With nothing absorbed the kernels' error against fp64 is that of PyTorch's own attention in the same dtype."""
    x = case(77, batch=1, dim=64, rotary=0, dtype=dtype)
    q, k, v = (x[n].transpose(1, 2) for n in "qkv")
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    low = [y.to(dtype) for y in (q, k, v)]
    theirs = F.scaled_dot_product_attention(*low, is_causal=True, enable_gqa=True).transpose(1, 2).double() - want
    log_decay = log_decay_from_logits(x["logits"].float(), 8.0)
    o, _ = nha_attention(*(x[n].to(dtype) for n in "qkv"), log_decay, window=77, backend="triton")
    ours = o.double() - want
    assert ours.norm() <= 1.1 * theirs.norm()
    assert ours.abs().max() <= 2 * theirs.abs().max()


@pytest.mark.filterwarnings("ignore:Input #")  # gradcheck would like fp64
def test_gradcheck():
    """Gradients agree with finite differences of the kernels' own forward pass (fp32, so the step is large)."""
    x = {n: y.float() for n, y in case(21, batch=1, groups=1, dtype=FLOAT).items()}
    logits = x.pop("logits")
    names = ("q", "k", "v")
    rest = {n: y for n, y in x.items() if n not in names}

    def function(q, k, v, z):
        o, _ = nha_attention(q, k, v, log_decay_from_logits(z, 8.0), window=4, sinks=1, backend="triton", **rest)
        return o

    inputs = [x[n].requires_grad_() for n in names] + [logits.requires_grad_()]
    assert torch.autograd.gradcheck(function, inputs, eps=1e-2, atol=2e-3, rtol=2e-2, fast_mode=True)


def test_fp16_gradients_do_not_overflow():
    """Slots that keep for long gather much gradient before the small write strength brings it down again."""
    x = {n: y.half() for n, y in case(160, batch=1, groups=1, rotary=0, dtype=torch.float16).items() if n in "qkv"}
    log_decay = torch.full((1, 160, 1, 16), -1e-3)
    leaves = [x[n].requires_grad_() for n in "qkv"]
    o, _ = nha_attention(*leaves, log_decay, window=0, backend="triton")
    o.backward(torch.full_like(o, 2000.0))
    exact = [y.detach().double().requires_grad_() for y in leaves]
    o, _ = nha_attention(*exact, log_decay.double(), window=0, backend="torch")
    o.backward(torch.full_like(o, 2000.0))
    assert all(y.grad.isfinite().all() for y in leaves)
    got, want = leaves[2].grad.double(), exact[2].grad  # equal gradients for all outputs leave next to none for q and k
    assert (got - want).norm() <= 5e-3 * want.norm()
