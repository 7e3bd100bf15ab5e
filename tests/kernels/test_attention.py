"""The chunked path against the fp64 recurrence, forward and every gradient."""

import pytest
import torch
import torch.nn.functional as F
from nha_kernels import NHAState, log_decay_from_logits, nha_attention
from nha_kernels import chunked as chunked_path
from op_cases import EXACT, FLOAT, TOLERANCE, assert_close, attend, case, run

SHAPES = [  # time, window, sinks, query heads per group, rotary dims, mask_empty
    (53, 5, 0, 2, 16, True),
    (41, 0, 0, 2, 0, False),
    (40, 0, 3, 1, 4, True),
    (83, 37, 4, 2, 8, True),
    (23, 50, 2, 2, 16, False),
    (20, 13, 2, 3, 16, True),
    (3, 1, 0, 1, 16, True),
    (67, 33, 1, 1, 16, False),
]


@pytest.mark.parametrize("dtype", [EXACT, FLOAT])
@pytest.mark.parametrize("time,window,sinks,repeat,rotary,mask_empty", SHAPES)
def test_equals_recurrence(time, window, sinks, repeat, rotary, mask_empty, dtype):
    x = case(time, repeat=repeat, rotary=rotary, dtype=dtype)
    options = {"window": window, "sinks": sinks, "mask_empty": mask_empty}
    want = run(x, EXACT, 8.0, backend="reference", **options)
    assert_close(run(x, dtype, 8.0, backend="torch", **options), want, TOLERANCE[dtype])


@pytest.mark.parametrize("tau", [1.0, 8.0])
@pytest.mark.parametrize("kind", ["forget", "fade", "keep", "mixed"])
@pytest.mark.parametrize("window", [0, 19])
def test_extreme_gates_in_fp32(window, kind, tau):
    x = case(71, kind=kind, dtype=FLOAT)
    want = run(x, EXACT, tau, backend="reference", window=window, sinks=1)
    assert_close(run(x, FLOAT, tau, backend="torch", window=window, sinks=1), want, TOLERANCE[FLOAT])


@pytest.mark.parametrize("branch", ["window", "slots"])
@pytest.mark.parametrize("mask_empty", [True, False])
def test_branches(branch, mask_empty):
    x = case(45)
    options = {"window": 11, "sinks": 2, "branch": branch, "mask_empty": mask_empty}
    want = run(x, EXACT, 8.0, backend="reference", **options)
    assert_close(run(x, EXACT, 8.0, backend="torch", **options), want, TOLERANCE[EXACT])
    if branch == "slots" and mask_empty:
        assert not want["o"][:, :13].any()
        assert want["o"][:, 13].any()


def test_branch_masses_add_up():
    x = case(45)
    lse = {b: attend(x, window=11, sinks=2, branch=b, return_lse=True)[1] for b in ("both", "window", "slots")}
    torch.testing.assert_close(torch.logaddexp(lse["window"], lse["slots"]), lse["both"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("workspace", [1, 50_000])
def test_any_workspace_gives_the_same(workspace, monkeypatch):
    """Segments of one block of one row, and groups of several rows, change nothing but rounding."""
    x = case(150, batch=3)
    options = {"window": 70, "sinks": 3, "backend": "torch"}
    want = run(x, EXACT, 8.0, **options)
    monkeypatch.setattr(chunked_path, "WORKSPACE", {"cpu": workspace})
    assert_close(run(x, EXACT, 8.0, **options), want, TOLERANCE[EXACT])


@pytest.mark.parametrize("window", [77, 1000])
def test_wide_window_is_softmax_attention(window):
    """With nothing absorbed this is the teacher's attention; fp32, 1e-5 is the contract, rounding is 1e-6."""
    x = {n: y.float() for n, y in case(77).items() if not n.startswith("slot")}
    q, k, v = (x[n].transpose(1, 2) for n in "qkv")
    half = q.shape[-1] // 2
    cos, sin = x["cos"][:, None], x["sin"][:, None]
    q, k = (y * cos + torch.cat([-y[..., half:], y[..., :half]], -1) * sin for y in (q, k))
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    o, _ = attend(x, window=window)
    assert (o - want).abs().max() <= 1e-5
    with_lse, _, _ = attend(x, window=window, return_lse=True)  # does not go through SDPA
    assert (with_lse - want).abs().max() <= 1e-5


def test_only_wanted_gradients():
    """Gate-only training gives the gradients that full training gives, and none elsewhere."""
    x = case(60)
    gates = ("logits", "slot_q_scale", "slot_bias")
    grads = []
    for wanted in ((*"qkv", *gates), gates):
        leaves = {n: y.clone().requires_grad_(n in wanted) for n, y in x.items()}
        o, _ = attend(leaves, window=9, sinks=2)
        o.square().sum().backward()
        grads.append({n: y.grad for n, y in leaves.items()})
    assert_close({n: grads[1][n] for n in gates}, {n: grads[0][n] for n in gates}, TOLERANCE[EXACT])
    assert all(grads[1][n] is None for n in "qkv")


@pytest.mark.parametrize("time", [33, 40])
def test_bf16_inputs(time):
    """Inputs of low precision are computed in fp32: only the output is rounded (2^-8)."""
    x = {n: y.bfloat16() for n, y in case(time).items()}
    o, state = attend(x, window=8, sinks=1, output_final_state=True)
    want, _ = attend({n: y.double() for n, y in x.items()}, window=8, sinks=1, backend="reference")
    assert o.dtype == torch.bfloat16
    assert state.slot_k.dtype == torch.float32
    assert state.ring_k.dtype == torch.bfloat16
    assert (o.double() - want).abs().max() <= want.abs().max() / 256


def test_memory_is_linear_in_time():
    """At T = 16384 a T x T score alone is 1 GiB; what is saved and every tensor made stay far below."""
    time, dim, largest = 16384, 16, 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, time, h, dim, generator=g, requires_grad=True) for h in (2, 1, 1))
    log_decay = log_decay_from_logits(torch.randn(1, time, 1, 8, generator=g), 8.0).requires_grad_()
    saved = 0

    def count(x):
        nonlocal saved
        saved += x.numel() * x.element_size()
        return x

    with Watch(), torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        o, _ = nha_attention(q, k, v, log_decay, window=64)
        o.sum().backward()
    per_token = 4 * dim * 2 * 4  # bytes of q, k and v
    assert saved <= 8 * per_token * time
    assert largest <= 32 * 2**20
    assert torch.isfinite(log_decay.grad).all()


@pytest.mark.parametrize(
    "change,message",
    [
        (
            {"k": torch.zeros(2, 9, 3, 16), "v": torch.zeros(2, 9, 3, 16)},
            r"heads of q \[2, 9, 4, 16\].*\[2, 9, 3, 16\]",
        ),
        ({"v": torch.zeros(2, 9, 2, 8)}, r"k \[2, 9, 2, 16\] and v \[2, 9, 2, 8\]"),
        ({"log_decay": torch.zeros(2, 8, 2, 8)}, r"log_decay \[2, 8, 2, 8\] and k \[2, 9, 2, 16\]"),
        ({"q": torch.zeros(2, 9, 64)}, r"q must have 4 dimensions"),
        ({"cos": torch.zeros(1, 9, 16)}, "cos and sin must be given together"),
        ({"cos": torch.zeros(3, 9, 16), "sin": torch.zeros(3, 9, 16)}, r"cos \[3, 9, 16\].*q \[2, 9, 4, 16\]"),
        ({"slot_q_scale": torch.zeros(2, 16)}, r"slot_q_scale \[2, 16\] must be \[4, 16\]"),
        ({"slot_bias": torch.zeros(2)}, r"slot_bias \[2\] must be \[4\]"),
        ({"window": -1}, "window must be an integer >= 0, got -1"),
        ({"sinks": -1}, "sinks must be an integer >= 0"),
        ({"branch": "memory"}, "branch 'memory' is unknown"),
        ({"backend": "cuda"}, "backend 'cuda' is unknown"),
        ({"padding_mask": torch.ones(2, 8, dtype=torch.bool)}, r"padding_mask must be bool \[2, 9\].*\[2, 8\]"),
        ({"cu_seqlens": torch.tensor([0, 9])}, r"one row, got q \[2, 9, 4, 16\]"),
        ({"initial_state": NHAState.new(1, 2, 8, 16, window=4)}, r"slots \[1, 2, 8, 16\] must be \[2, 2, 8, 16\]"),
        ({"initial_state": NHAState.new(2, 2, 8, 16, window=5)}, "made for window 5 and sinks 0.*window 4"),
        ({"initial_state": NHAState.new(2, 2, 8, 16, window=4, rotary_dim=8)}, "keeps 8 rotary dimensions"),
    ],
)
def test_wrong_arguments_name_both_sides(change, message):
    inputs = {n: torch.zeros(2, 9, h, d) for n, h, d in (("q", 4, 16), ("k", 2, 16), ("v", 2, 16), ("log_decay", 2, 8))}
    with pytest.raises(ValueError, match=message):
        nha_attention(**({"window": 4} | inputs | change))


def test_backend_choice(monkeypatch):
    x = case(9)
    with pytest.raises(RuntimeError, match="cannot run"):
        attend(x, window=2, backend="triton")
    monkeypatch.setenv("NHA_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="cannot run"):
        attend(x, window=2, backend="torch")
