"""Block sizes and warps of the prefill kernels, by architecture.

Legend: D head_dim, M slots.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

SUB_CHUNK = 16  # rows whose decays share a reference point; `gates.LOG_DECAY_FLOOR` allows no more in fp32
SINK_BLOCK = 16


@dataclass(frozen=True)
class Tiling:
    """Block sizes and warps of one problem's kernels."""

    rows: int = 64  # BT
    keys: int = 64  # BN
    slots: int = 64  # BM of the attention kernels
    scan_slots: int = 16
    scan_dims: int = 64
    scan_stages: int = 3
    segments: int = 0  # of the state scan; 0 chooses
    warps: tuple[int, int, int, int] = (4, 4, 4, 4)  # attend, query side, key side, gate side
    stages: tuple[int, int, int, int] = (1, 1, 1, 1)
    gate_slots: int = 32


def power_of_two(n: int) -> int:
    """The least power of two that is at least n, and 16, the least size of a matrix product."""
    return max(16, 1 << (n - 1).bit_length())


def choose_tiling(dim: int, slots: int, dtype: torch.dtype, arch: str = "", backward: bool = False) -> Tiling:
    """Block sizes for a problem, chosen by what compiles without spills (kernels/bench/results/compile.md).

    Args:
        dim: head_dim.
        slots: M.
        dtype: of q, k, v.
        arch: "sm_80", "sm_90", ..., "gfx942"; empty in the interpreter.
        backward: of the backward pass, which recomputes its own tile states.
    """
    block = min(64, power_of_two(slots))
    out = Tiling(slots=block, gate_slots=min(32, block), scan_dims=min(64, power_of_two(dim)))
    if not arch:
        return replace(out, rows=32, keys=32)
    if arch == "sm_90":
        out = replace(out, scan_stages=2)
    amd, tensor_memory = arch.startswith("gfx"), arch in ("sm_100", "sm_103")
    small, many, synchronous = dim <= 64, slots > 64, not amd and not tensor_memory and arch != "sm_90"
    # What spills least, then fewest warps, then largest blocks. Four warps of AMD have 512 registers per thread, eight
    # half of that; NVIDIA's have 255 either way, so what does not fit needs eight. On synchronous mma (sm_8x) operands
    # take registers too: fewer rows, and slots in one block as long as they fit. Exact fp32 products are no matrix
    # instructions on NVIDIA and hold whole operands in registers.
    most = 4 if amd else 8
    if dtype == torch.float32:
        return replace(out, rows=16, keys=16, gate_slots=16, warps=(most,) * 4)
    if power_of_two(dim) > 128:
        return replace(out, rows=32 if backward or amd else 64, keys=32, gate_slots=16, warps=(most,) * 4)
    if not amd and not many:  # a second window block in flight, where registers allow it too
        out = replace(out, stages=(1 if arch == "sm_90" else 2, 2, 1 if tensor_memory else 2, 1))
    if not backward and synchronous:
        rows, block = 32 if slots > 128 else 64, min(128, power_of_two(slots))
        return replace(out, rows=rows, slots=block, warps=(4 if small and not many else 8, 4, 4, 4))
    if not backward:
        return replace(out, warps=(most if many and not tensor_memory else 4, 4, 4, 4))
    if synchronous or arch == "sm_90" and slots > 128:
        keys, block = 32 if small or many else 64, min(128, power_of_two(slots))
        return replace(out, rows=32, keys=keys, slots=block, warps=(4, 8, 8, 8))
    out = replace(out, keys=64 if small else 32)
    if amd:  # more rows on 256 slots take minutes to compile
        return replace(out, rows=32 if slots > 128 else 64, gate_slots=min(32, block) if small else 16)
    if arch == "sm_90" and not small:
        return replace(out, gate_slots=16, warps=(4, 8, 8, 4))
    return replace(out, warps=(4, 8, 8, 8))


@lru_cache(maxsize=8)
def architecture(device: torch.device) -> tuple[str, int]:
    """Architecture name and number of multiprocessors."""
    if device.type != "cuda":
        return "", 1
    p = torch.cuda.get_device_properties(device)
    name = getattr(p, "gcnArchName", "").split(":")[0] if torch.version.hip else f"sm_{p.major}{p.minor}"
    return name, p.multi_processor_count
