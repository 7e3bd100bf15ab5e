"""What a training step keeps alive, counted without allocating it: tensors on PyTorch's fake mode."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from nha_kernels import blocks, tiles
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensor storages that are alive, now and at most; those of logits apart.

    Args:
        vocabulary: a tensor whose last dimension is this long counts as logits.
    Attributes:
        now: bytes alive.
        peak: the most that were alive at once since `restart`.
        logits_at_peak: how many of these were of logits.
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.now = self.logits = self.peak = self.logits_at_peak = 0
        self._seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def restart(self) -> None:
        """Forget the peak."""
        self.peak, self.logits_at_peak = self.now, self.logits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        mask = args[1][0] if func is torch.ops.aten.index.Tensor and len(args[1]) == 1 else None
        if mask is not None and mask.dtype == torch.bool:  # how many are true is not known here: all of them, at most
            out = args[0].flatten(0, mask.ndim - 1).clone()
        elif func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return True  # asked of masks: whether all is plain
        else:
            out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, torch.Tensor):
                self._track(value)
        return out

    def _track(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        logits = size if tensor.ndim > 1 and tensor.shape[-1] == self.vocabulary else 0
        self.now, self.logits = self.now + size, self.logits + logits
        if self.now > self.peak:
            self.restart()
        self._seen[key] = weakref.ref(storage, self._forget(key, size, logits))

    def _forget(self, key: int, size: int, logits: int) -> Callable[[Any], None]:
        def gone(_: Any) -> None:
            self._seen.pop(key, None)
            self.now, self.logits = self.now - size, self.logits - logits

        return gone


@contextmanager
def counting(vocabulary: int) -> Iterator[LiveBytes]:
    """Inside, tensors are made without memory, and their bytes are counted."""
    live = LiveBytes(vocabulary)
    _forget_constants()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), live:
            yield live
    finally:
        _forget_constants()


def _forget_constants() -> None:
    """Empties the op's caches of small constants: those made without memory must not be met by a real call."""
    for module in (blocks, tiles):
        for made in vars(module).values():
            if hasattr(made, "cache_clear"):
                made.cache_clear()
