"""Which device a name means on this machine, and which process of a launch this is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from .errors import InputError


def world_of(environment: Mapping[str, str]) -> tuple[int, int, int]:
    """Rank, number of processes and rank on this machine, as `torchrun` and `accelerate launch` say them.

    Raises:
        InputError: a launcher's variable is not a number, or the rank is none of the processes.
    """
    found = []
    for name, alone in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        value = environment.get(name, alone)
        if not value.lstrip("-").isdigit():
            raise InputError(f"{name}: a number is needed, found {value!r}; start with torchrun, or unset it")
        found.append(int(value))
    rank, world, local = found
    if world < 2:
        return 0, 1, max(local, 0)
    if not 0 <= rank < world:
        raise InputError(f"RANK: 0 to {world - 1} is needed, found {rank}; start with torchrun, or unset WORLD_SIZE")
    return rank, world, local


def find_device(name: str) -> torch.device:
    """A device by name; `auto` takes a GPU where there is one. Of several processes each takes its own GPU.

    Raises:
        InputError: unknown, or not on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device: one of auto, cpu, mps, cuda or cuda:N is needed, found {name!r}") from error
    _, world, local = world_of(os.environ)
    if device.type == "cuda" and world > 1:
        if device.index is not None:
            raise InputError(f"device: with {world} processes each takes its own GPU, found {name}; use `cuda`")
        device = torch.device("cuda", local)
    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not there.get(device.type, False):
        raise InputError(f"device: this machine has no {device if device.index else name}; use `auto` or `cpu`")
    return device


def input_device(model: Any) -> torch.device:
    """Where a model takes its tokens, also where some of its tensors are read from disk as it computes."""
    place = getattr(getattr(model, "_hf_hook", None), "execution_device", None)
    return torch.device(model.device if place is None else place)


def working_device(name: str, threads: int | None) -> torch.device:
    """`find_device`, and torch's threads set to so many; None leaves them.

    Raises:
        InputError: as `find_device`.
    """
    device = find_device(name)
    if threads is not None:
        torch.set_num_threads(threads)
    return device
