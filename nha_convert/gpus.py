"""GPUs by name, with what their vendors' data sheets give as peaks. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .errors import InputError

TERA, GIGA = 10**12, 10**9


@dataclass(frozen=True)
class GPU:
    """One device.

    Attributes:
        name: what `--gpu` takes.
        half: FLOP/s of dense bf16 matrix products with fp32 accumulation, no sparsity.
        single: FLOP/s of fp32 outside matrix units, where PyTorch computes fp32 products unless told otherwise.
        bandwidth: bytes/s of device memory.
        memory: bytes of device memory, a GB taken as 10^9 bytes: what is more is left to driver and context.
    """

    name: str
    half: float
    single: float
    bandwidth: float
    memory: int


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("A100-40GB", 312 * TERA, 19.5 * TERA, 1555 * GIGA, 40 * GIGA),
        GPU("A100-80GB", 312 * TERA, 19.5 * TERA, 2039 * GIGA, 80 * GIGA),
        GPU("H100", 989 * TERA, 67 * TERA, 3350 * GIGA, 80 * GIGA),  # SXM
        GPU("H200", 989 * TERA, 67 * TERA, 4800 * GIGA, 141 * GIGA),  # SXM
        GPU("B200", 2250 * TERA, 75 * TERA, 8000 * GIGA, 180 * GIGA),  # HGX
        GPU("L40S", 362 * TERA, 91.6 * TERA, 864 * GIGA, 48 * GIGA),
        GPU("RTX-4090", 165 * TERA, 82.6 * TERA, 1008 * GIGA, 24 * GIGA),
        GPU("MI300X", 1307 * TERA, 163.4 * TERA, 5300 * GIGA, 192 * GIGA),
    )
}
"""Data-sheet peaks, which no program reaches: `SHARE` of them is counted on."""
DEFAULT_GPU = "H100"
SHARE = 0.5
"""Of a data sheet's peaks, matrix rate and bandwidth alike, what programs get: training of transformers commonly
reaches 0.4 to 0.6 of the matrix rate in its large products, and the kernels are held to twice their floors at most
(`kernels/bench/targets.py`)."""


@dataclass(frozen=True)
class Machine:
    """Equal GPUs that train together.

    Attributes:
        gpu: one of them.
        count: how many, at least 1; each runs one process.
    """

    gpu: GPU
    count: int = 1

    @property
    def label(self) -> str:
        """What tables and notes call it."""
        return f"{self.count} x {self.gpu.name}" if self.count > 1 else self.gpu.name


def find_machine(name: str | None = None, count: int | None = None) -> Machine:
    """GPUs by name; case, spaces and signs do not matter.

    Args:
        name: one of `GPUS`; None takes `DEFAULT_GPU`.
        count: how many; None takes 1.
    Raises:
        InputError: no GPU of this name, or fewer than one.
    """
    wanted = _plain(DEFAULT_GPU if name is None else name)
    found = next((gpu for known, gpu in GPUS.items() if _plain(known) == wanted), None)
    if found is None:
        raise InputError(f"--gpu: no GPU named {name!r} is known; allowed: {', '.join(GPUS)}")
    if count is not None and count < 1:
        raise InputError(f"--gpus: a number of at least 1 is needed, found {count}")
    return Machine(found, count or 1)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
