"""No timing without a green gate: the GPU tests, and each benchmarked shape against fp64 at a reduced length."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from nha_kernels import nha_attention, nha_decode

from .cases import DecodeCase, Inputs, Shape, make_inputs, make_state

LIMITS = {  # of |got - want| / |want|, forward and gradients
    torch.bfloat16: (4e-3, 6e-2),  # twice what the bf16 prototypes had: 2e-3, and 3e-2 (the gates' gradient)
    torch.float32: (1e-5, 1e-5),  # the op's contract
}
REFERENCE_WINDOW = 64
"""Up to this window the fp64 recurrence is the reference. Beyond it the recurrence needs minutes, and the chunked path
in fp64 takes its place: the default test lane holds it to the recurrence within 1e-11."""
GRADS = ("dq", "dk", "dv", "dlog_decay")


class RedGate(Exception):
    """Something is not correct; no timing may be published."""


def run_gpu_tests(root: Path, seconds: float) -> dict[str, Any]:
    """`pytest -m gpu tests/kernels` in its own process.

    Args:
        root: of the repository.
        seconds: time limit.
    Returns:
        The command and how many tests passed.
    Raises:
        RedGate: a test failed, none ran, or the limit was reached.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "gpu.xml"
        shown = ["pytest", "-q", "-m", "gpu", "tests/kernels"]
        if importlib.util.find_spec("xdist") is not None:
            shown += ["-n", "6"]  # compilation is most of the time
        try:
            done = subprocess.run(
                [sys.executable, "-m", *shown, f"--junitxml={report}"],
                cwd=root,
                timeout=seconds,
                capture_output=True,
                text=True,
            )
        except subprocess.TimeoutExpired as error:
            raise RedGate(f"the GPU tests did not finish within {seconds:.0f} s") from error
        if done.returncode:
            raise RedGate(f"the GPU tests failed (exit {done.returncode}):\n{done.stdout[-6000:]}{done.stderr[-2000:]}")
        suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    count = {n: sum(int(s.get(n, 0)) for s in suites) for n in ("tests", "skipped", "failures", "errors")}
    passed = count["tests"] - count["skipped"] - count["failures"] - count["errors"]
    if passed <= 0:
        raise RedGate(f"no GPU test passed: {count['tests']} found, {count['skipped']} skipped")
    return {"command": " ".join(shown), "passed": passed, "skipped": count["skipped"]}


@contextmanager
def _poisoned() -> Iterator[None]:
    """Memory that is handed out uninitialised holds NaN, so an element that nothing writes shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _run(shape: Shape, x: Inputs, dtype: torch.dtype | None, backend: str, gradients: bool) -> dict[str, torch.Tensor]:
    """Output and, if asked for, gradients."""
    x = x if dtype is None else Inputs(*(t.to(dtype) for t in x))
    leaves = [t.detach().requires_grad_() for t in x[:4]]
    o = nha_attention(*leaves, window=shape.window, cos=x.cos, sin=x.sin, backend=backend)[0]
    grads = torch.autograd.grad(o, leaves, x.grad) if gradients else ()
    return {"o": o.detach()} | dict(zip(GRADS, grads))


def _judge(
    name: str, got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], dtype: torch.dtype
) -> dict[str, Any]:
    """Relative errors, all within their limits."""
    errors, limits = {}, LIMITS[dtype]
    for part, exact in want.items():
        size = exact.double().norm().clamp(min=1e-30)
        errors[part] = float((got[part].double() - exact.double()).norm() / size)
        limit = limits[part in GRADS]
        if not errors[part] <= limit:  # NaN too
            raise RedGate(f"{name}: {part} is off by {errors[part]:.2e}, allowed {limit:.0e}")
    return {"check": name, "errors": errors, "limits": {"forward": limits[0], "gradients": limits[1]}}


def check_attention(
    shape: Shape, backend: str, device: torch.device, dtype: torch.dtype, *, gradients: bool
) -> dict[str, Any]:
    """Output and gradients of one shape at a reduced, odd length, on fresh inputs, twice.

    Args:
        shape: the layer.
        backend: that will be timed.
        device, dtype: as timed.
        gradients: check them, too.
    Returns:
        Errors and limits.
    Raises:
        RedGate: an error is over its limit, or two runs on the same inputs differ.
    """
    time = shape.window + (23 if device.type == "cpu" else 149)
    reference = "reference" if shape.window <= REFERENCE_WINDOW else "torch"
    seed = torch.seed() % 2**31
    x = make_inputs(shape, 1, time, device=device, dtype=dtype, seed=seed)
    want = _run(shape, x, torch.float64, reference, gradients)
    with _poisoned():
        first, second = (_run(shape, x, None, backend, gradients) for _ in range(2))
    name = f"{shape.model} W {shape.window} M {shape.slots} T {time} seed {seed}"
    for part, value in first.items():
        if not torch.equal(value, second[part]) and bool(value.isfinite().all()):
            raise RedGate(f"{name}: {part} differs between two runs on the same inputs")
    return _judge(name, first, want, dtype) | {"reference": f"{reference} fp64"}


def check_decode(case: DecodeCase, backend: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Two decode steps: outputs, and the slots they leave behind.

    Args:
        case: the layer; the batch is reduced to 2.
        backend: that will be timed.
        device, dtype: as timed.
    Returns:
        Errors and limits.
    Raises:
        RedGate: an error is over its limit.
    """
    small = replace(case, batch=2)
    state = make_state(small, device=device, dtype=dtype, seed=torch.seed() % 2**31)
    exact = state.with_tensors(
        {n: t.double() if t.is_floating_point() else t.clone() for n, t in state.tensors().items()}
    )
    got, want = {}, {}
    for step in range(2):
        x = make_inputs(case.shape, 2, 1, device=device, dtype=dtype, seed=torch.seed() % 2**31)
        y = Inputs(*(t.double() for t in x))
        with _poisoned():
            got[f"o{step}"] = nha_decode(*x[:4], state, cos=x.cos, sin=x.sin, backend=backend)
        want[f"o{step}"] = nha_decode(*y[:4], exact, cos=y.cos, sin=y.sin, backend="reference")
    got |= {"slot_k": state.slot_k, "slot_v": state.slot_v}
    want |= {"slot_k": exact.slot_k, "slot_v": exact.slot_v}
    if not torch.equal(state.seen, exact.seen):
        raise RedGate(f"decode W {case.shape.window}: `seen` is {state.seen.tolist()}, not {exact.seen.tolist()}")
    name = f"decode {case.shape.model} W {case.shape.window} M {case.shape.slots} context {case.context}"
    return _judge(name, got, want, dtype) | {"reference": "reference fp64"}
