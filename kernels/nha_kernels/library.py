"""PyTorch operators over the kernels, so that compile, fake tensors, checkpointing and sharding see one call each.

`tile_attention` is the Triton prefill with its backward; `decode` is one token, in Triton or PyTorch.

Legend: as in tile_call.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from .backends import triton_step
from .decode_torch import decode_step
from .state import NHAState

NAMESPACE = re.sub(r"\W", "_", __package__ or "nha")
"""Each copy of this package, as they travel with checkpoints, has operators of its own: a name that is registered twice
leaves the first registration's callers with a dangling operator."""

Maybe = torch.Tensor | None


def _tile_call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    cos: Maybe,
    sin: Maybe,
    slot_q_scale: Maybe,
    slot_bias: Maybe,
    initial: Maybe,
    seen: Maybe,
    starts: Maybe,
    lengths: Maybe,
    documents: int,
    window: int,
    sinks: int,
    past: int,
    scale: float,
    mask_empty: bool,
    branch: str,
    output_final: bool,
    backward: bool = False,
) -> Any:
    from .tile_call import Options, Tensors, TileCall

    slots, states = _uses_slots(q, starts, documents, window, sinks, initial, mask_empty, branch, output_final)
    options = Options(window, sinks, past, scale, mask_empty, slots, branch != "slots", states)
    tensors = Tensors(q, k, v, log_decay, cos, sin, slot_q_scale, slot_bias, initial, seen, starts, lengths)
    return TileCall(tensors, options, documents, backward=backward)


def _uses_slots(
    q: torch.Tensor,
    starts: Maybe,
    documents: int,
    window: int,
    sinks: int,
    initial: Maybe,
    mask_empty: bool,
    branch: str,
    output_final: bool,
) -> tuple[bool, bool]:
    """Whether queries attend to slots, and whether the slots' states are wanted at all."""
    longest = q.shape[0] if starts is not None else q.shape[0] // documents
    absorbs = initial is not None or longest > window + sinks
    slots = branch != "window" and (absorbs or not mask_empty)
    return slots, slots or (absorbs and output_final)


@torch.library.custom_op(NAMESPACE + "::tile_attention", mutates_args=())
def tile_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    cos: Maybe,
    sin: Maybe,
    slot_q_scale: Maybe,
    slot_bias: Maybe,
    initial: Maybe,
    seen: Maybe,
    starts: Maybe,
    lengths: Maybe,
    documents: int,
    window: int,
    sinks: int,
    past: int,
    scale: float,
    mask_empty: bool,
    branch: str,
    output_final: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prefill on the Triton kernels.

    Args:
        q to lengths: as `tile_call.Tensors`.
        documents: N.
        window, sinks, past, scale, mask_empty: as `tile_call.Options`.
        branch, output_final: as `ops.nha_attention`.
    Returns:
        o [L,H,D], lse [L,H] fp32, final slots [2,N,G,M,D] fp32 (empty where nothing can be absorbed or is wanted);
        rows of documents shorter than their place hold anything.
    """
    call = _tile_call(
        q, k, v, log_decay, cos, sin, slot_q_scale, slot_bias, initial, seen, starts, lengths, documents, window,
        sinks, past, scale, mask_empty, branch, output_final,
    )  # fmt: skip
    with torch.cuda.device_of(q):
        return call.forward()


@tile_attention.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    cos: Maybe,
    sin: Maybe,
    slot_q_scale: Maybe,
    slot_bias: Maybe,
    initial: Maybe,
    seen: Maybe,
    starts: Maybe,
    lengths: Maybe,
    documents: int,
    window: int,
    sinks: int,
    past: int,
    scale: float,
    mask_empty: bool,
    branch: str,
    output_final: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _, states = _uses_slots(q, starts, documents, window, sinks, initial, mask_empty, branch, output_final)
    shape = (2, documents, *log_decay.shape[1:], q.shape[2]) if states else (0,)
    exact = log_decay.new_empty
    return torch.empty_like(q), exact(q.shape[:2]), exact(shape)


@torch.library.custom_op(NAMESPACE + "::tile_attention_backward", mutates_args=())
def tile_attention_backward(
    grad: torch.Tensor,
    lse_grad: Maybe,
    final_grad: Maybe,
    o: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    cos: Maybe,
    sin: Maybe,
    slot_q_scale: Maybe,
    slot_bias: Maybe,
    initial: Maybe,
    seen: Maybe,
    starts: Maybe,
    lengths: Maybe,
    documents: int,
    window: int,
    sinks: int,
    past: int,
    scale: float,
    mask_empty: bool,
    branch: str,
    output_final: bool,
    need_keys: bool,
) -> list[torch.Tensor]:
    """Gradients of q, k, v, log_decay, slot_q_scale, slot_bias and initial; empty where there is none.

    Args:
        grad, lse_grad, final_grad: of what `tile_attention` gave; None is 0.
        o, lse: what it gave.
        q to output_final: what it got.
        need_keys: whether k or v wants a gradient.
    """
    call = _tile_call(
        q, k, v, log_decay, cos, sin, slot_q_scale, slot_bias, initial, seen, starts, lengths, documents, window,
        sinks, past, scale, mask_empty, branch, output_final, backward=True,
    )  # fmt: skip
    with torch.cuda.device_of(q):
        grads = call.backward(o, lse, grad, lse_grad, final_grad if call.options.states else None, need_keys)
    slots, states = call.options.slots, call.options.states
    return [
        grads.q,
        *(lse.new_empty(0) if x is None else x for x in (grads.k, grads.v)),
        grads.log_decay,
        _made(grads.slot_q_scale, slot_q_scale, slots, lse),
        _made(grads.slot_bias, slot_bias, slots, lse),
        _made(grads.initial, initial, states, lse),
    ]


def _made(grad: torch.Tensor, of: Maybe, computed: bool, like: torch.Tensor) -> torch.Tensor:
    """The gradient of an optional tensor: empty where there is none, 0 where no kernel computed it."""
    if of is None:
        return like.new_empty(0)
    return grad if computed else torch.zeros_like(of)


@tile_attention_backward.register_fake
def _(
    grad: torch.Tensor,
    lse_grad: Maybe,
    final_grad: Maybe,
    o: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    cos: Maybe,
    sin: Maybe,
    slot_q_scale: Maybe,
    slot_bias: Maybe,
    initial: Maybe,
    *rest: Any,
) -> list[torch.Tensor]:
    made = [torch.empty_like(x) if rest[-1] else lse.new_empty(0) for x in (k, v)]  # rest[-1]: need_keys
    optional = [lse.new_empty(0) if x is None else torch.empty_like(x) for x in (slot_q_scale, slot_bias, initial)]
    return [torch.empty_like(q), *made, torch.empty_like(log_decay), *optional]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(*output[:2], *inputs[:12])
    ctx.options = inputs[12:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Maybe, lse_grad: Maybe, final_grad: Maybe) -> tuple[Any, ...]:
    o, lse, *tensors = ctx.saved_tensors
    grad = torch.zeros_like(o) if grad is None else grad.contiguous()
    lse_grad = None if lse_grad is None else lse_grad.contiguous()
    final_grad = None if final_grad is None or not final_grad.numel() else final_grad.contiguous()
    need_keys = any(ctx.needs_input_grad[1:3])
    grads = tile_attention_backward(grad, lse_grad, final_grad, o, lse, *tensors, *ctx.options, need_keys)
    given = [*grads[:4], None, None, *grads[4:7]]
    return (*(g if want else None for g, want in zip(given, ctx.needs_input_grad)), *[None] * (20 - len(given)))


tile_attention.register_autograd(_backward, setup_context=_save)


def state_of(held: list[torch.Tensor], window: int, sinks: int) -> NHAState | None:
    """The state of tensors in the order of `NHAState.tensors`, or None of none."""
    if not held:
        return None
    empty = NHAState.new(0, 0, 0, 0, window=window, sinks=sinks)
    return empty.with_tensors(dict(zip(empty.tensors(), held, strict=True)))


@torch.library.custom_op(NAMESPACE + "::decode", mutates_args=("held",))
def decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    held: list[torch.Tensor],
    cos: Maybe,
    sin: Maybe,
    slot_q_scale: Maybe,
    slot_bias: Maybe,
    padding_mask: Maybe,
    window: int,
    sinks: int,
    scale: float,
    mask_empty: bool,
    branch: str,
    backend: str,
) -> torch.Tensor:
    """One token per row; `held`, the state's tensors in the order of `NHAState.tensors`, is updated in place.

    Args:
        q to branch: as `ops.nha_decode`.
        backend: "triton" or "torch".
    Returns:
        o [B,1,H,D] in q.dtype.
    """
    state = state_of(held, window, sinks)
    assert state is not None
    step = triton_step() if backend == "triton" else decode_step
    with torch.cuda.device_of(q):
        o = step(
            q,
            k,
            v,
            log_decay,
            state,
            cos=cos,
            sin=sin,
            scale=scale,
            mask_empty=mask_empty,
            slot_q_scale=slot_q_scale,
            slot_bias=slot_bias,
            padding_mask=padding_mask,
            branch=branch,
        )
    for old, new in zip(held, state.tensors().values(), strict=True):
        if new is not old:  # made contiguous for a kernel
            old.copy_(new)
    return o.contiguous()


@decode.register_fake
def _(q: torch.Tensor, *rest: Any) -> torch.Tensor:
    return q.new_empty(q.shape)
