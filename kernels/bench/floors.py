"""The kernels' floors, as `nha_kernels.floors` counts them."""

from __future__ import annotations

from nha_kernels.floors import Peaks, Work, backward, decode, floor, forward, window_keys

__all__ = ["Peaks", "Work", "backward", "decode", "floor", "forward", "window_keys"]
