"""What is timed: our op, and what others offer for the same job.

Every baseline gets random q and k as if they were already rotated, so it pays for no rotation; ours rotates inside.

Legend: B rows, T time, H query heads, G key/value heads, D head_dim, M slots, W window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from nha_kernels import nha_attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from . import gsa
from .cases import Case, Inputs, Shape
from .timing import Run

BLOCK = 128  # FlexAttention's default block size
GSA = "gsa chain"
KINDS = ("forward", "backward", "forward+backward")


class Prepared(NamedTuple):
    """A contender on one input set."""

    attend: Callable[[], torch.Tensor]
    leaves: list[torch.Tensor]
    grad: torch.Tensor  # of the output


@dataclass(frozen=True)
class Baseline:
    """An alternative.

    `prepare` puts the inputs into its layout; `unavailable` says why it cannot run here, or None;
    `parts` are the parameters that its time depends on beside batch, time and heads;
    `meaning` is the sum of the calls of `nha_attention` that compute the same function, for its check.
    """

    name: str
    what: str
    prepare: Callable[[Shape, Inputs], Prepared]
    unavailable: Callable[[torch.device], str | None]
    parts: tuple[str, ...]
    meaning: Callable[[Shape, int], list[dict[str, Any]]]

    def key(self, case: Case) -> tuple[Any, ...]:
        """Cases of equal key take the same time."""
        s = case.shape
        return (self.name, s.heads, s.groups, s.head_dim, case.time, case.tokens, *(getattr(s, p) for p in self.parts))


def _leaf(x: torch.Tensor) -> torch.Tensor:
    return x.detach().requires_grad_()


def ours(shape: Shape, x: Inputs, backend: str) -> Prepared:
    """The public op; the rotation is inside, the gates' logsigmoid is not."""
    leaves = [_leaf(t) for t in x[:4]]

    def attend() -> torch.Tensor:
        return nha_attention(*leaves, window=shape.window, cos=x.cos, sin=x.sin, backend=backend)[0]

    return Prepared(attend, leaves, x.grad)


def callables(prepared: Prepared, kind: str) -> Run:
    """One of `KINDS`; "backward" keeps the graph of a forward made here."""
    attend, leaves, grad = prepared
    if kind == "forward":
        return torch.no_grad()(attend)
    if kind == "backward":
        o = attend()
        return lambda: torch.autograd.grad(o, leaves, grad, retain_graph=True)
    return lambda: torch.autograd.grad(attend(), leaves, grad)


def _heads_first(x: Inputs) -> list[torch.Tensor]:
    """Leaves q, k, v as views [B,H,T,D]."""
    return [_leaf(t.transpose(1, 2)) for t in (x.q, x.k, x.v)]


def _sdpa(shape: Shape, x: Inputs) -> Prepared:
    q, k, v = _heads_first(x)

    def attend() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return Prepared(attend, [q, k, v], x.grad.transpose(1, 2))


def _flash(shape: Shape, x: Inputs) -> Prepared:
    attend, leaves, grad = _sdpa(shape, x)

    def flash() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return attend()

    return Prepared(flash, leaves, grad)


def sdpa_choice(x: Inputs) -> str:
    """Name of the kernel that SDPA takes by itself for these inputs."""
    try:
        q, k, v = (t.detach() for t in _heads_first(x))
        choice = torch._fused_sdp_choice(q, k, v, is_causal=True, enable_gqa=True)
        return str(SDPBackend(choice).name).lower()
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        return f"unknown ({error})"


@cache
def sliding_window_mask(time: int, window: int, device: torch.device) -> BlockMask:
    """The block mask of `0 <= q - k < window`, written down instead of evaluated on T x T scores.

    Args:
        time: T.
        window: W.
        device: where.
    Returns:
        What `create_block_mask` gives (a test compares), in O((T / 128)^2) memory.
    """

    def near(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (q >= k) & (q - k < window)

    blocks = -(-time // BLOCK)
    row, col = torch.arange(blocks, device=device)[:, None] * BLOCK, torch.arange(blocks, device=device)[None] * BLOCK
    q_last, k_last = (row + BLOCK).clamp(max=time) - 1, (col + BLOCK).clamp(max=time) - 1
    touched = (col <= q_last) & (row - k_last < window)
    whole = (k_last <= row) & (q_last - col < window) & (row + BLOCK <= time) & (col + BLOCK <= time)

    def listed(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        order = torch.argsort(chosen.to(torch.int8), dim=-1, descending=True, stable=True)
        return chosen.sum(-1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]

    return BlockMask.from_kv_blocks(
        *listed(touched & ~whole), *listed(whole), BLOCK_SIZE=BLOCK, mask_mod=near, seq_lengths=(time, time)
    )


@cache
def _flex() -> Callable[..., Any]:
    """FlexAttention, compiled for every shape by itself."""
    torch._dynamo.config.recompile_limit = 256
    return torch.compile(flex_attention, dynamic=False)


def _window(shape: Shape, x: Inputs) -> Prepared:
    leaves = _heads_first(x)
    mask = sliding_window_mask(x.q.shape[1], shape.window, x.q.device)
    call = _flex()
    return Prepared(lambda: call(*leaves, block_mask=mask, enable_gqa=True), leaves, x.grad.transpose(1, 2))


def _gsa_chain(shape: Shape, x: Inputs) -> Prepared:
    gsa.tune_shortly()
    near, (q, k, v), _ = _window(shape, x)
    write, gate = (_leaf(t) for t in gsa.gates(x))

    def attend() -> torch.Tensor:
        far = gsa.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), write, gate)  # [B,T,H,D]
        return far + near().transpose(1, 2)

    return Prepared(attend, [q, k, v, write, gate], x.grad)


def _always(device: torch.device) -> str | None:
    return None


def _on_cuda(device: torch.device) -> str | None:
    return None if device.type == "cuda" else "needs a CUDA device"


def _with_fla(device: torch.device) -> str | None:
    return gsa.missing() or _on_cuda(device)


def _causal(shape: Shape, time: int) -> list[dict[str, Any]]:
    return [{"window": time, "branch": "window"}]


def _near(shape: Shape, time: int) -> list[dict[str, Any]]:
    return [{"window": shape.window, "branch": "window"}]


def _far_and_near(shape: Shape, time: int) -> list[dict[str, Any]]:
    return [{"window": 0, "branch": "slots", "mask_empty": False}, *_near(shape, time)]


BASELINES = (
    Baseline(
        "sdpa", "torch's scaled_dot_product_attention, causal, kernel of its own choice", _sdpa, _always, (), _causal
    ),
    Baseline("flash", "the same with the FlashAttention kernel", _flash, _on_cuda, (), _causal),
    Baseline("flex", "FlexAttention, causal sliding window of W, compiled", _window, _on_cuda, ("window",), _near),
    Baseline(
        GSA,
        "flash-linear-attention's chunk_gsa over all tokens plus the FlexAttention window, outputs added. It leaves "
        "out the shift by W tokens and the merge into one softmax that the paper's chain has, and takes ready decays "
        "and write strengths: a lower bound of that chain's time. chunk_gsa repeats the key/value heads itself.",
        _gsa_chain,
        _with_fla,
        ("window", "slots"),
        _far_and_near,
    ),
)


def check_baseline(baseline: Baseline, shape: Shape, x: Inputs, limit: float) -> str | None:
    """Whether a baseline computes what its time is published for.

    Args:
        baseline: to be checked.
        shape: the layer.
        x: a short input set.
        limit: largest relative error of its output.
    Returns:
        None, or what is wrong.
    """
    exact = [t.detach().double() for t in x[:4]]
    if "slots" in baseline.parts:  # its gates are rounded to the inputs' dtype
        exact[3] = gsa.gates(x)[1].double()
    want = sum(
        nha_attention(*exact, backend="torch", **options)[0] for options in baseline.meaning(shape, x.q.shape[1])
    )
    with torch.no_grad():
        got = baseline.prepare(shape, x).attend().double()
    if got.shape != want.shape:
        got = got.transpose(1, 2)
    error = float((got - want).norm() / want.norm())
    return (
        None if error <= limit else f"its output is off by {error:.1e} relative to the reference, allowed {limit:.0e}"
    )


def decode_sdpa(shape: Shape, batch: int, context: int, device: torch.device, dtype: torch.dtype) -> Run:
    """One token of full attention over a key/value cache of `context` tokens, through SDPA.

    Args:
        shape: heads.
        batch, context: rows, tokens in the cache.
        device, dtype: of the cache.
    Returns:
        The step.
    Raises:
        MemoryError: the cache does not fit the device's free memory.
    """
    needed = 2 * batch * shape.groups * context * shape.head_dim * dtype.itemsize
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        if needed > 0.9 * free:
            raise MemoryError(f"one layer's cache needs {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")
    q = torch.randn(batch, shape.heads, 1, shape.head_dim, device=device, dtype=dtype)
    k, v = torch.randn(2, batch, shape.groups, context, shape.head_dim, device=device, dtype=dtype).unbind(0)
    return torch.no_grad()(lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True))
