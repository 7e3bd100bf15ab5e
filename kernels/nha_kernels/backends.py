"""Which implementation runs a call."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch

BACKENDS = ("auto", "triton", "torch", "reference")
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETING = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


_as_on_gpu = False


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Inside, calls are dispatched as if their tensors were on a GPU: for fake tensors, on which no kernel runs."""
    global _as_on_gpu
    before, _as_on_gpu = _as_on_gpu, True
    try:
        yield
    finally:
        _as_on_gpu = before


def named(backend: str) -> str:
    """The backend asked for: the environment variable NHA_BACKEND goes before the argument.

    Raises:
        ValueError: the name is unknown.
    """
    name = os.environ.get("NHA_BACKEND") or backend
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r} is unknown; use one of {', '.join(BACKENDS)}")
    return name


def choose_backend(
    backend: str, q: torch.Tensor, log_decay: torch.Tensor, state_dtype: torch.dtype = torch.float32
) -> str:
    """The backend to run: "triton", "torch" or "reference".

    Args:
        backend: one of `BACKENDS`; the environment variable NHA_BACKEND goes before it.
        q: [B,T,H,D]
        log_decay: [B,T,G,M]
        state_dtype: of the slots, where there is a state.
    Raises:
        ValueError: the name is unknown.
        RuntimeError: "triton" was asked for by name and cannot run this call; "auto" falls back with one warning.
    """
    name = named(backend)
    device = "cuda" if _as_on_gpu else q.device.type
    if name not in ("auto", "triton") or (name == "auto" and device != "cuda"):
        return "torch" if name == "auto" else name
    reason = _obstacle(device, q.dtype, q.shape[-1], q.shape[2] // log_decay.shape[2], log_decay.shape[3])
    if not reason and state_dtype != torch.float32:
        reason = f"its state's slots are {state_dtype}, the kernels keep fp32"
    if not reason:
        return "triton"
    if name == "triton":
        raise RuntimeError(f"backend 'triton' cannot run this: {reason}; use backend='auto' or 'torch'")
    _warn_once(reason)
    return "torch"


def _obstacle(device: str, dtype: torch.dtype, dim: int, repeat: int, slots: int) -> str:
    """What keeps the Triton kernels from running a call; empty if nothing does."""
    if not HAS_TRITON:
        return "triton is not installed (pip install triton)"
    if device != "cuda" and not INTERPRETING:
        return f"its tensors are on {device}, Triton needs a GPU (or TRITON_INTERPRET=1, for tests)"
    if dtype not in DTYPES:
        return f"its dtype is {dtype}, allowed are fp32, bf16 and fp16"
    if dim % 2 or not 16 <= dim <= 256:
        return f"its head_dim is {dim}, allowed are even sizes from 16 to 256"
    if not 8 <= slots <= 256:
        return f"it has {slots} slots, allowed are 8 to 256"
    if repeat > 16:
        return f"it has {repeat} query heads per key head, allowed are up to 16"
    return ""


@lru_cache(maxsize=16)
def _warn_once(reason: str) -> None:
    warnings.warn(f"NHA runs in PyTorch, not in Triton: {reason}", RuntimeWarning, stacklevel=3)


def triton_step() -> Callable[..., torch.Tensor]:
    """`decode_triton.decode_step_triton`; imported when it is wanted, for a machine may lack triton."""
    from .decode_triton import decode_step_triton

    return decode_step_triton
