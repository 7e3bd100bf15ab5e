"""The states of a process's random generators, as tensors and plain values, so that reading them runs no code."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """The states of all random generators of this process; `torch.load(weights_only=True)` reads them back."""
    version, words, gauss = random.getstate()
    name, keys, place, has_gauss, cached = np.random.get_state(legacy=True)
    gpu = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {
        "python": (version, torch.tensor(words), gauss),
        "numpy": (str(name), torch.tensor(np.asarray(keys, np.int64)), int(place), int(has_gauss), float(cached)),
        "cpu": torch.get_rng_state(),
        "gpu": gpu,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Takes what `random_state` gave."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["cpu"])
    if state["gpu"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["gpu"])
