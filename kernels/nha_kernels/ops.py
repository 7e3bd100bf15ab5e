"""The public op: validation, choice of backend, and the one-token step.

Legend: B rows, T time, H query heads, G key/value heads (R = H / G), D head_dim, M slots, W window, S sinks,
P rotary dims, N documents.
"""

from __future__ import annotations

from typing import Any

import torch

from .backends import choose_backend, named, triton_step
from .chunked import nha_chunked
from .decode_torch import decode_step
from .library import decode
from .library_chunked import chunked_attention
from .reference import nha_recurrent
from .state import NHAState
from .tiled import nha_tiled

BRANCHES = ("both", "window", "slots")


def nha_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    *,
    window: int,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    sinks: int = 0,
    scale: float | None = None,
    mask_empty: bool = True,
    slot_q_scale: torch.Tensor | None = None,
    slot_bias: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    initial_state: NHAState | None = None,
    output_final_state: bool = False,
    branch: str = "both",
    return_lse: bool = False,
    backend: str = "auto",
) -> tuple[Any, ...]:
    """Softmax attention over gated memory slots, attention sinks and a sliding window.

    A token's rank is its index among the real tokens of its row (or document). The query of rank r sees exactly the
    keys of rank r - W < j <= r and the sinks j < S, j <= r; every other earlier token has been absorbed by the slots.

    Args:
        q: [B,T,H,D] un-rotated queries; H % G == 0.
        k, v: [B,T,G,D] un-rotated keys, and values.
        log_decay: [B,T,G,M] natural log of the slot decay, <= 0;
            values under `gates.LOG_DECAY_FLOOR` count as the floor.
        window: W, exact tokens each query sees, itself included; 0 is a pure linear RNN.
        cos, sin: [B or 1,T,P] rotary factors of these tokens, P <= D, as transformers' rotary modules return them: the
            second half repeats the first. None rotates nothing; the slots see no rotation.
        sinks: S, first tokens of a row that stay exact keys for ever and are never absorbed.
        scale: of all scores; None is D ** -0.5.
        mask_empty: leave the slots out of the softmax until they hold something; False gives each of them e^bias.
        slot_q_scale: [H,D] factor on the slots' queries; None is 1.
        slot_bias: [H] added to the slots' scores; None is 0.
        padding_mask: [B,T] bool, True for real tokens; padding takes no place and its output rows are 0.
        cu_seqlens: [N+1] offsets from 0 to T of documents packed into B = 1; they do not see each other.
        initial_state: what earlier calls left, one row per row of q (or per document); it is not modified.
        output_final_state: also return what a later call needs.
        branch: "both"; "window" (slots left out); "slots" (window and sinks left out).
        return_lse: also return the log of the softmax denominator.
        backend: "auto" (Triton on a GPU, else PyTorch), "triton", "torch" or "reference" (fp64 recurrence); the
            environment variable NHA_BACKEND overrides it.
    Returns:
        (o, final) with o [B,T,H,D] in q.dtype and final an NHAState or None; with return_lse (o, lse, final),
        lse [B,T,H] (-inf where nothing may be seen; there o is 0).
    Raises:
        ValueError: shapes, head groups, sizes or the state disagree; the message names both sides.
        RuntimeError: the backend was asked for by name and cannot run here.
    Source: arXiv 2510.07019, section 3. Reference: reference.nha_recurrent.
    """
    _check_inputs(q, k, v, log_decay, window, cos, sin, sinks, slot_q_scale, slot_bias, branch)
    rows = _check_rows(q, padding_mask, cu_seqlens)
    if initial_state is not None:
        _check_state(initial_state, rows, k, log_decay, window, sinks, cos)
    chosen = choose_backend(backend, q, log_decay)
    options: dict[str, Any] = {
        "window": window,
        "sinks": sinks,
        "cos": cos,
        "sin": sin,
        "scale": scale,
        "mask_empty": mask_empty,
        "slot_q_scale": slot_q_scale,
        "slot_bias": slot_bias,
        "padding_mask": padding_mask,
        "cu_seqlens": cu_seqlens,
        "initial_state": initial_state,
        "branch": branch,
    }
    o: Any
    lse: Any
    final: Any
    if chosen == "reference":
        o, lse, final = nha_recurrent(q, k, v, log_decay, **options)
        final = final if output_final_state else None
    else:
        options |= {"output_final_state": output_final_state, "return_lse": return_lse}
        if chosen == "triton":
            o, lse, final = nha_tiled(q, k, v, log_decay, by_name=named(backend) == "triton", **options)
        elif torch.compiler.is_compiling():
            o, lse, final = _compiled_chunked(q, k, v, log_decay, **options)
        else:
            o, lse, final = nha_chunked(q, k, v, log_decay, **options)
    o = o.to(q.dtype)
    return (o, lse, final) if return_lse else (o, final)


def _compiled_chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    *,
    initial_state: NHAState | None,
    scale: float | None,
    output_final_state: bool,
    return_lse: bool,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None, NHAState | None]:
    """`nha_chunked` as one operator, which a compiler does not look into."""
    held = [] if initial_state is None else list(initial_state.tensors().values())
    o, lse, *after = chunked_attention(
        q,
        k,
        v,
        log_decay,
        held=held,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        output_final=output_final_state,
        **options,
    )
    state = None
    if output_final_state:
        sizes: dict[str, Any] = {"window": options["window"], "sinks": options["sinks"]}
        state = NHAState(*after, **sizes)
    return o, lse if return_lse else None, state


def nha_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    state: NHAState,
    *,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    scale: float | None = None,
    mask_empty: bool = True,
    slot_q_scale: torch.Tensor | None = None,
    slot_bias: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
    branch: str = "both",
    backend: str = "auto",
) -> torch.Tensor:
    """One token per row; the state is updated in place. No gradient.

    Args:
        q: [B,1,H,D] un-rotated query.
        k, v: [B,1,G,D] un-rotated key, and value.
        log_decay: [B,1,G,M].
        state: of B rows, each at its own position.
        cos, sin: [B or 1,1,P].
        padding_mask: [B,1] bool; a row with False is left as it was and its output is 0.
        scale, mask_empty, slot_q_scale, slot_bias, branch, backend: as in `nha_attention`.
    Returns:
        o [B,1,H,D] in q.dtype.
    Raises:
        ValueError: shapes or the state disagree, or there is more than one token.
        RuntimeError: the backend was asked for by name and cannot run here.
    Reference: reference.nha_recurrent.
    """
    _check_inputs(q, k, v, log_decay, state.window, cos, sin, state.sinks, slot_q_scale, slot_bias, branch)
    if q.shape[1] != 1:
        raise ValueError(f"nha_decode takes one token, got q {tuple(q.shape)}; use nha_attention with initial_state")
    _check_state(state, _check_rows(q, padding_mask, None), k, log_decay, state.window, state.sinks, cos)
    if not torch.compiler.is_compiling() and state.slot_k.is_inference() and not torch.is_inference_mode_enabled():
        for name, x in state.tensors().items():  # made under inference_mode, and may not be written outside it
            setattr(state, name, x.clone())
    options: dict[str, Any] = {
        "cos": cos,
        "sin": sin,
        "scale": scale,
        "mask_empty": mask_empty,
        "slot_q_scale": slot_q_scale,
    }
    options |= {"slot_bias": slot_bias, "padding_mask": padding_mask, "branch": branch}
    chosen = choose_backend(backend, q, log_decay, state.slot_k.dtype)
    with torch.no_grad():
        if torch.compiler.is_compiling() and chosen != "reference":
            held = list(state.tensors().values())
            scale = q.shape[-1] ** -0.5 if scale is None else scale
            return decode(
                q, k, v, log_decay, held, cos, sin, slot_q_scale, slot_bias, padding_mask, state.window, state.sinks,
                scale, mask_empty, branch, chosen,
            )  # fmt: skip
        if chosen != "reference":
            step = triton_step() if chosen == "triton" else decode_step
            with torch.cuda.device_of(q):
                return step(q, k, v, log_decay, state, **options)
        options |= {"window": state.window, "sinks": state.sinks, "initial_state": state}
        o, _, final = nha_recurrent(q, k, v, log_decay, **options)
        for name, x in state.tensors().items():
            x.copy_(final.tensors()[name])
        return o.to(q.dtype)


def _shape(x: torch.Tensor) -> str:
    return str(list(x.shape))


def _check_inputs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    window: int,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    sinks: int,
    slot_q_scale: torch.Tensor | None,
    slot_bias: torch.Tensor | None,
    branch: str,
) -> None:
    for name, x in (("q", q), ("k", k), ("v", v), ("log_decay", log_decay)):
        if x.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions [B,T,heads,...], got {_shape(x)}")
    batch, time, heads, dim = q.shape
    groups = k.shape[2]
    if time == 0:
        raise ValueError(f"there must be at least one token, got q {_shape(q)}")
    if k.shape != v.shape:
        raise ValueError(f"k {_shape(k)} and v {_shape(v)} must have the same shape")
    if k.shape[:2] != q.shape[:2] or k.shape[3] != dim:
        raise ValueError(f"q {_shape(q)} and k {_shape(k)} must agree in batch, time and head_dim")
    if groups == 0 or heads % groups:
        raise ValueError(f"the heads of q {_shape(q)} must be a multiple of the heads of k {_shape(k)}")
    if log_decay.shape[:3] != k.shape[:3]:
        raise ValueError(f"log_decay {_shape(log_decay)} and k {_shape(k)} must agree in batch, time and heads")
    for name, size in (("window", window), ("sinks", sinks)):
        if not isinstance(size, int) or size < 0:
            raise ValueError(f"{name} must be an integer >= 0, got {size!r}")
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin must be given together")
    if cos is not None and sin is not None:
        if cos.shape != sin.shape:
            raise ValueError(f"cos {_shape(cos)} and sin {_shape(sin)} must have the same shape")
        if cos.dim() != 3 or cos.shape[0] not in (1, batch) or cos.shape[1] != time:
            raise ValueError(f"cos {_shape(cos)} must be [{batch} or 1, {time}, P] for q {_shape(q)}")
        if cos.shape[2] > dim or cos.shape[2] % 2:
            raise ValueError(f"the last dimension of cos {_shape(cos)} must be even and at most that of q {_shape(q)}")
    if slot_q_scale is not None and slot_q_scale.shape != (heads, dim):
        raise ValueError(f"slot_q_scale {_shape(slot_q_scale)} must be [{heads}, {dim}] for q {_shape(q)}")
    if slot_bias is not None and slot_bias.shape != (heads,):
        raise ValueError(f"slot_bias {_shape(slot_bias)} must be [{heads}] for q {_shape(q)}")
    if branch not in BRANCHES:
        raise ValueError(f"branch {branch!r} is unknown; use one of {', '.join(BRANCHES)}")


def _check_rows(q: torch.Tensor, padding_mask: torch.Tensor | None, cu_seqlens: torch.Tensor | None) -> int:
    """Rows a state has: the batch, or the number of packed documents."""
    batch, time = q.shape[:2]
    if padding_mask is not None and cu_seqlens is not None:
        raise ValueError("padding_mask and cu_seqlens cannot be combined: leave padding out of packed documents")
    if padding_mask is not None and (padding_mask.shape != (batch, time) or padding_mask.dtype != torch.bool):
        raise ValueError(
            f"padding_mask must be bool {[batch, time]} for q {_shape(q)}, "
            f"got {padding_mask.dtype} {_shape(padding_mask)}"
        )
    if cu_seqlens is None:
        return batch
    if batch != 1:
        raise ValueError(f"cu_seqlens needs documents packed into one row, got q {_shape(q)}")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.is_floating_point():
        raise ValueError(f"cu_seqlens must be integers [N+1], got {cu_seqlens.dtype} {_shape(cu_seqlens)}")
    if torch.compiler.is_compiling():
        return len(cu_seqlens) - 1  # its values are not known yet
    seen = None if cu_seqlens.is_inference() else (time, cu_seqlens._version)
    if (
        seen is None or getattr(cu_seqlens, "_nha_checked", None) != seen
    ):  # once, not once per layer: it waits for a GPU
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != time or ends != sorted(ends):
            raise ValueError(f"cu_seqlens must rise from 0 to {time}, got {ends}")
        cu_seqlens._nha_checked = seen  # type: ignore[attr-defined]
    return len(cu_seqlens) - 1


def _check_state(
    state: NHAState,
    rows: int,
    k: torch.Tensor,
    log_decay: torch.Tensor,
    window: int,
    sinks: int,
    cos: torch.Tensor | None,
) -> None:
    wanted = (rows, k.shape[2], log_decay.shape[3], k.shape[3])
    if state.slot_k.shape != wanted:
        raise ValueError(f"the state's slots {_shape(state.slot_k)} must be {list(wanted)} [rows,G,M,D]")
    if (state.window, state.sinks) != (window, sinks):
        raise ValueError(
            f"the state was made for window {state.window} and sinks {state.sinks}, "
            f"the call is for window {window} and sinks {sinks}"
        )
    rotary = 0 if cos is None else cos.shape[-1]
    if state.rotary_dim != rotary:
        raise ValueError(f"the state keeps {state.rotary_dim} rotary dimensions, cos and sin have {rotary}")
