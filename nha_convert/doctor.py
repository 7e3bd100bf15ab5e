"""Can this machine do the work? Each check says what was found and, where it fails, what fixes it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .errors import InputError
from .recipe import embedded_teacher, list_recipes, load_recipe
from .weights.weight_files import check_weights

OLDEST = {"torch": (2, 11), "transformers": (5, 17), "peft": (0, 19), "accelerate": (1, 12), "safetensors": (0, 7)}
"""The oldest versions that the code is written for."""


@dataclass
class Check:
    """One line of the doctor's answer; `fix` is empty where the check passed."""

    name: str
    passed: bool
    found: str
    fix: str = ""


def examine() -> list[Check]:
    """Every check, in the order a reader wants them."""
    return [
        _python(),
        *(_package(name, least) for name, least in OLDEST.items()),
        _devices(),
        _triton(),
        _resources(),
        _kernels_name(),
        _operator(),
        _recipes(),
        _teacher(),
    ]


def _python() -> Check:
    here = sys.version_info[:2]
    passed = (3, 10) <= here <= (3, 13)
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Check("python", passed, found, "" if passed else "use Python 3.10 to 3.13")


def _package(name: str, least: tuple[int, int]) -> Check:
    wanted = ".".join(map(str, least))
    try:
        found = version(name)
    except PackageNotFoundError:
        return Check(name, False, "not installed", f"pip install '{name}>={wanted}'")
    here = tuple(int(part) for part in found.split("+")[0].split(".")[:2])
    return Check(name, here >= least, found, "" if here >= least else f"pip install '{name}>={wanted}'")


def _devices() -> Check:
    found = f"cpu ({torch.get_num_threads()} threads)"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found += f", cuda:{index} {properties.name} ({properties.total_memory / 2**30:.0f} GiB)"
    if torch.backends.mps.is_available():
        found += ", mps"
    return Check("devices", True, found)


def _triton() -> Check:
    """The kernels' compiler; without it a GPU runs the slower PyTorch path."""
    try:
        return Check("triton", True, version("triton"))
    except PackageNotFoundError:
        needed = torch.cuda.is_available()
        return Check("triton", not needed, "not installed", "pip install 'triton>=3.6'" if needed else "")


def _resources() -> Check:
    disk = shutil.disk_usage(Path.cwd()).free / 2**30
    found = f"{disk:.1f} GiB free here"
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found += f", {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB of memory"
    passed = disk >= 1
    return Check("resources", passed, found, "" if passed else "free 1 GiB of disk for the demo")


def _kernels_name() -> Check:
    """An importable package `kernels` of ours would be taken by transformers for the PyPI library of that name."""
    ours = Path(__file__).resolve().parent.parent / "kernels" / "__init__.py"
    return Check(
        "kernels folder", not ours.exists(), "no package of its own", f"delete {ours}" if ours.exists() else ""
    )


def _operator() -> Check:
    """The fast path of the attention op against its fp64 definition, and one-token decoding, on a small case."""
    from nha_kernels.ops import nha_attention, nha_decode

    generator = torch.Generator().manual_seed(0)
    batch, length, heads, groups, size, slots, window = 1, 23, 4, 2, 8, 6, 5

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    q, k, v = (
        normal(batch, length, heads, size),
        normal(batch, length, groups, size),
        normal(batch, length, groups, size),
    )
    log_decay = -torch.nn.functional.softplus(normal(batch, length, groups, slots)) / 8
    exact, _ = nha_attention(q, k, v, log_decay, window=window, sinks=2, backend="reference")
    fast, _ = nha_attention(q, k, v, log_decay, window=window, sinks=2)
    last = slice(length - 1, length)
    _, state = nha_attention(
        q[:, :-1], k[:, :-1], v[:, :-1], log_decay[:, :-1], window=window, sinks=2, output_final_state=True
    )
    step = nha_decode(q[:, last], k[:, last], v[:, last], log_decay[:, last], state)
    worst = max((fast - exact).abs().max().item(), (step - exact[:, last]).abs().max().item())
    passed = worst <= 1e-5
    return Check(
        "attention op",
        passed,
        f"largest difference from the definition {worst:.1e}",
        "" if passed else "reinstall torch; NHA_BACKEND=reference computes the definition",
    )


def _recipes() -> Check:
    wrong = []
    for name in list_recipes():
        try:
            load_recipe(name)
        except InputError as error:
            wrong.append(str(error))
    names = ", ".join(list_recipes())
    passed = bool(names) and not wrong
    return Check("recipes", passed, names or "none", "" if passed else "; ".join(wrong) or "install the package anew")


def _teacher() -> Check:
    folder = embedded_teacher()
    try:
        check_weights(folder)
    except InputError as error:
        return Check("embedded model", False, str(error), "install the package anew")
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return Check("embedded model", True, f"{size / 2**20:.1f} MiB")
