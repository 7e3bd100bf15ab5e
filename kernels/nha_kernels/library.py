"""PyTorch operators over the kernels, so that compile, fake tensors, checkpointing and sharding see one call each.

`tile_attention` is the Triton prefill with its backward; `chunked_attention` the chunked PyTorch path as one opaque
call, which only compiled code uses; `decode` one token, on either.

Legend: as in tile_call.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import torch

from .backends import triton_step
from .chunked import nha_chunked
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
        initial_state=_state(held, window, sinks),
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


def _state(held: list[torch.Tensor], window: int, sinks: int) -> NHAState | None:
    """The state of tensors in the order of `NHAState.tensors`, or None of none."""
    if not held:
        return None
    empty = NHAState.new(0, 0, 0, 0, window=window, sinks=sinks)
    return empty.with_tensors(dict(zip(empty.tensors(), held, strict=True)))


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

    return _recorder().submit(run).result()


@lru_cache(maxsize=1)
def _recorder() -> ThreadPoolExecutor:
    """A thread of its own: in the thread that calls an operator, autograd records nothing of its body."""
    return ThreadPoolExecutor(max_workers=1)


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
    state = _state(held, window, sinks)
    assert state is not None
    step = triton_step() if backend == "triton" else decode_step
    return step(
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
    ).contiguous()


@decode.register_fake
def _(q: torch.Tensor, *rest: Any) -> torch.Tensor:
    return q.new_empty(q.shape)
