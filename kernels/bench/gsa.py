"""flash-linear-attention's GSA: its call, and making its autotuning fit into a run.

chunk_gsa tunes about 350 kernel configurations per number of heads and slots. One after the other their compilation
takes minutes, so worker processes compile them in parallel into Triton's cache while the GPU tests run; the tuning
itself still happens here, at the timed size, over every configuration, with shorter repetitions than Triton's default.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .cases import LLAMA, Inputs, Shape, make_inputs

BATCHES = (1, 16, 8, 4, 64)  # some of the kernels are compiled per batch
WORKERS = max(1, min(10, (os.cpu_count() or 2) - 4))
COMPILE_SECONDS, TUNE_SECONDS = 400.0, 45.0  # guesses of what is to come: all compilation in one process; tuning alone
WARMUP_MS, REPEAT_MS = 5, 20  # of one configuration

_compiled: set[tuple[int, int, int]] = set()  # heads, groups and slots whose configurations lie in Triton's cache
_tuned: set[tuple[int, int, int]] = set()


def _sizes(shape: Shape) -> tuple[int, int, int]:
    return shape.heads, shape.groups, shape.slots


def missing() -> str | None:
    """Why chunk_gsa cannot be imported, or None."""
    for package in ("fla", "einops"):
        if importlib.util.find_spec(package) is None:
            return f"the package {package} is not installed (see kernels/bench/README.md for the wheels)"
    return None


def gates(x: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Write strengths and log decays [B,T,G,M] in the inputs' dtype, as flash-linear-attention's layer makes them."""
    return (1 - x.log_decay.exp()).to(x.q.dtype), x.log_decay.to(x.q.dtype)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, write: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Attention over the slots, which have absorbed all tokens up to and with the query's: [B,T,H,D]."""
    from fla.ops.gsa import chunk_gsa  # type: ignore[import-not-found, unused-ignore]

    return chunk_gsa(q, k, v, s=write, g=gate)[0]


def expected_seconds(shape: Shape) -> float:
    """What the first call for these heads and slots will take, roughly."""
    if _sizes(shape) in _tuned:
        return 0.0
    return TUNE_SECONDS if _sizes(shape) in _compiled else COMPILE_SECONDS


def note_tuned(shape: Shape) -> None:
    """The kernels of this shape have been tuned in this process."""
    _tuned.add(_sizes(shape))


def tune_shortly() -> None:
    """Let Triton's autotuner spend `REPEAT_MS` per configuration on flash-linear-attention's kernels, not on others."""
    import triton
    from triton.runtime.autotuner import Autotuner

    default: Any = Autotuner.__dict__["do_bench"]
    if isinstance(default, property):
        return

    def bench(self: Any) -> Any:
        if self.base_fn.__module__.split(".")[0] == "fla":
            return partial(triton.testing.do_bench, warmup=WARMUP_MS, rep=REPEAT_MS)
        return default.func(self)

    Autotuner.do_bench = property(bench)


class Precompilation:
    """Workers that fill Triton's cache with the configurations of the acceptance shape."""

    def __init__(self, device: torch.device) -> None:
        self.begun = time.monotonic()
        self.workers: list[subprocess.Popen[bytes]] = []
        if device.type != "cuda" or missing() is not None:
            return
        kernels = str(Path(__file__).resolve().parents[1])
        env = os.environ | {"PYTHONPATH": os.pathsep.join([kernels, *filter(None, [os.environ.get("PYTHONPATH")])])}
        for index in range(WORKERS):
            command = [sys.executable, "-m", "bench.gsa", str(index), str(WORKERS)]
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            self.workers.append(subprocess.Popen(command, env=env, **quiet))  # type: ignore[call-overload]

    def finish(self, seconds: float) -> str:
        """Wait at most so long, end what still runs, and say how it went: nothing may disturb the timings."""
        if not self.workers:
            return "not run"
        until = time.monotonic() + max(seconds, 0.0)
        for worker in self.workers:
            try:
                worker.wait(max(until - time.monotonic(), 0.01))
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
        good = sum(worker.returncode == 0 for worker in self.workers)
        if good == len(self.workers):
            _compiled.add(_sizes(LLAMA))
        return f"{good} of {len(self.workers)} workers finished, {time.monotonic() - self.begun:.0f} s"


def compile_share(index: int, count: int) -> None:
    """Run every `count`-th configuration of every kernel once, on short inputs.

    Args:
        index, count: which share.
    """
    import fla.ops.gsa  # type: ignore[import-not-found, unused-ignore]  # noqa: F401  (makes its autotuners)
    from triton.runtime.autotuner import Autotuner

    every = Autotuner.prune_configs

    def share(self: Any, *options: Any) -> Any:
        configs = every(self, *options)
        return configs[index::count] or configs[:1]

    def once(call: Any, quantiles: Any = None) -> list[float]:
        call()
        return [0.0, 0.0, 0.0]

    Autotuner.prune_configs = share
    Autotuner.do_bench = property(lambda self: once)
    for batch in BATCHES:
        x = make_inputs(LLAMA, batch, 256, device=torch.device("cuda"), dtype=torch.bfloat16, seed=0)
        leaves = [t.detach().requires_grad_() for t in (x.q, x.k, x.v, *gates(x))]
        torch.autograd.grad(attend(*leaves), leaves, x.grad)
    torch.cuda.synchronize()


if __name__ == "__main__":
    compile_share(int(sys.argv[1]), int(sys.argv[2]))
