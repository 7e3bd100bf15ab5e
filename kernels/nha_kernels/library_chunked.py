"""The chunked PyTorch path as one opaque operator, which only compiled code uses.

Legend: B rows, T time, H query heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .chunked import nha_chunked
from .library import NAMESPACE, Maybe, state_of
from .state import NHAState


def _chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    slot_q_scale: Maybe,
    slot_bias: Maybe,
    held: list[torch.Tensor],
    cos: Maybe,
    sin: Maybe,
    padding_mask: Maybe,
    cu_seqlens: Maybe,
    window: int,
    sinks: int,
    scale: float,
    mask_empty: bool,
    branch: str,
    output_final: bool,
) -> list[torch.Tensor]:
    o, lse, final = nha_chunked(
        q,
        k,
        v,
        log_decay,
        cos=cos,
        sin=sin,
        padding_mask=padding_mask,
        cu_seqlens=cu_seqlens,
        initial_state=state_of(held, window, sinks),
        output_final_state=output_final,
        return_lse=True,
        window=window,
        sinks=sinks,
        scale=scale,
        mask_empty=mask_empty,
        slot_q_scale=slot_q_scale,
        slot_bias=slot_bias,
        branch=branch,
    )
    assert lse is not None
    return [o.to(q.dtype), lse, *(final.tensors().values() if final is not None else ())]


@torch.library.custom_op(NAMESPACE + "::chunked_attention", mutates_args=())
def chunked_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    slot_q_scale: Maybe,
    slot_bias: Maybe,
    held: list[torch.Tensor],
    cos: Maybe,
    sin: Maybe,
    padding_mask: Maybe,
    cu_seqlens: Maybe,
    window: int,
    sinks: int,
    scale: float,
    mask_empty: bool,
    branch: str,
    output_final: bool,
) -> list[torch.Tensor]:
    """The chunked PyTorch path as one opaque call; its backward pass runs it once more.

    Args:
        held: tensors of the initial state in the order of `NHAState.tensors`, or none.
        q to output_final: as `ops.nha_attention`.
    Returns:
        o [B,T,H,D], lse [B,T,H] and, if wanted, the final state's tensors.
    """
    tensors = (q, k, v, log_decay, slot_q_scale, slot_bias, held, cos, sin, padding_mask, cu_seqlens)
    out = _chunked(*tensors, window, sinks, scale, mask_empty, branch, output_final)
    return [x.clone(memory_format=torch.contiguous_format) for x in out]


@chunked_attention.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    slot_q_scale: Maybe,
    slot_bias: Maybe,
    held: list[torch.Tensor],
    cos: Maybe,
    sin: Maybe,
    padding_mask: Maybe,
    cu_seqlens: Maybe,
    window: int,
    sinks: int,
    scale: float,
    mask_empty: bool,
    branch: str,
    output_final: bool,
) -> list[torch.Tensor]:
    exact = torch.float64 if torch.float64 in (q.dtype, k.dtype, v.dtype, log_decay.dtype) else torch.float32
    out = [q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=exact)]
    if output_final:
        rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        kept = k.dtype if exact == torch.float32 else exact
        rotary = 0 if cos is None else cos.shape[2]
        groups, slots, dim = k.shape[2], log_decay.shape[3], q.shape[3]
        state = NHAState.new(
            rows, groups, slots, dim, window=window, sinks=sinks, rotary_dim=rotary, dtype=kept, device=q.device
        )
        out += state.tensors().values()
    return out


@torch.library.custom_op(NAMESPACE + "::chunked_attention_backward", mutates_args=())
def chunked_attention_backward(
    grads: list[torch.Tensor],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    slot_q_scale: Maybe,
    slot_bias: Maybe,
    held: list[torch.Tensor],
    cos: Maybe,
    sin: Maybe,
    padding_mask: Maybe,
    cu_seqlens: Maybe,
    window: int,
    sinks: int,
    scale: float,
    mask_empty: bool,
    branch: str,
    output_final: bool,
) -> list[torch.Tensor]:
    """Gradients of q, k, v, log_decay, slot_q_scale, slot_bias (those given) and of the floating tensors of `held`.

    Args:
        grads: of every floating tensor that `chunked_attention` gave.
        q to output_final: what it got.
    """

    def run() -> list[torch.Tensor]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v, log_decay)]
        extra = [None if x is None else x.detach().requires_grad_() for x in (slot_q_scale, slot_bias)]
        state = [x.detach().requires_grad_(x.is_floating_point()) for x in held]
        tensors: Any = (*leaves, *extra, state, cos, sin, padding_mask, cu_seqlens)
        options: Any = (window, sinks, scale, mask_empty, branch, output_final)
        out = _chunked(*tensors, *options)
        out = [x for x in out if x.is_floating_point()]
        pairs = [(x, g) for x, g in zip(out, grads, strict=True) if x.requires_grad]
        inputs = [x for x in (*leaves, *extra, *state) if x is not None and x.requires_grad]
        made = torch.autograd.grad([x for x, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True)
        return [torch.zeros_like(x) if g is None else g.clone() for x, g in zip(inputs, made, strict=True)]

    with _recording():
        return run()


@contextmanager
def _recording() -> Iterator[None]:
    """Let autograd record inside an operator's body, where PyTorch leaves it out."""
    core = torch._C
    left_out = core._dispatch_tls_local_exclude_set()
    for name in ("AutogradCPU", "AutogradCUDA", "AutogradOther", "ADInplaceOrView"):
        left_out = left_out.remove(getattr(core.DispatchKey, name))
    with core._ForceDispatchKeyGuard(core._dispatch_tls_local_include_set(), left_out), torch.enable_grad():
        yield


@chunked_attention_backward.register_fake
def _(
    grads: list[torch.Tensor],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    slot_q_scale: Maybe,
    slot_bias: Maybe,
    held: list[torch.Tensor],
    *rest: Any,
) -> list[torch.Tensor]:
    inputs = [x for x in (q, k, v, log_decay, slot_q_scale, slot_bias) if x is not None]
    return [x.new_empty(x.shape) for x in (*inputs, *(x for x in held if x.is_floating_point()))]


def _save_chunked(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    held = inputs[6]
    ctx.save_for_backward(*inputs[:6], *inputs[7:11], *held)
    ctx.options, ctx.floating = inputs[11:], [x.is_floating_point() for x in output]


def _chunked_backward(ctx: Any, grads: list[torch.Tensor]) -> tuple[Any, ...]:
    saved = list(ctx.saved_tensors)
    tensors, others, held = saved[:6], saved[6:10], saved[10:]
    wanted = [g for g, floating in zip(grads, ctx.floating, strict=True) if floating]
    made = iter(chunked_attention_backward(wanted, *tensors, held, *others, *ctx.options))
    own = [None if x is None else next(made) for x in tensors]
    return (*own, [next(made) if x.is_floating_point() else None for x in held], *[None] * 10)


chunked_attention.register_autograd(_chunked_backward, setup_context=_save_chunked)
