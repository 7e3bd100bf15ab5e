"""Timing: device events on CUDA, a host clock on CPU (toy runs); median over runs that rotate among input sets."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from nha_kernels.floors import Peaks

FLUSH_BYTES = 1 << 30
"""Written before each run: pushes the inputs out of L2, and at 3 to 4 TB/s keeps the device busy for about 0.3 ms, so
that the host has queued the run's launches before its first event is reached."""
FEWEST, MOST = 5, 60  # runs of one measurement
SECONDS = 0.25  # spent on the runs of one measurement, beside warm-up

Run = Callable[[], object]


class Stopwatch:
    """Times callables on one device."""

    def __init__(self, device: torch.device, toy: bool = False) -> None:
        self.device, self.toy = device, toy
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None

    def measure(self, runs: Sequence[Run], *, per: int = 1) -> dict[str, float]:
        """Time callables that do the same on different inputs.

        Args:
            runs: one callable per input set, taken in turn.
            per: divide every time by this (steps inside one callable).
        Returns:
            ms (median), ms_min, ms_p10, ms_p90, runs and input_sets.
        """
        for run in (*runs, *runs):  # compile, then once warm
            run()
        estimate = statistics.median(self._times(runs, len(runs)))
        count = len(runs) if self.toy else min(max(FEWEST, int(SECONDS * 1e3 / max(estimate, 1e-3))), MOST)
        times = sorted(t / per for t in self._times(runs, count))
        return {
            "ms": statistics.median(times),
            "ms_min": times[0],
            "ms_p10": times[len(times) // 10],
            "ms_p90": times[(len(times) * 9) // 10],
            "runs": count,
            "input_sets": len(runs),
        }

    def _times(self, runs: Sequence[Run], count: int) -> list[float]:
        """Milliseconds of `count` runs."""
        if self._flush is None:
            times = []
            for i in range(count):
                begun = time.perf_counter()
                runs[i % len(runs)]()
                times.append((time.perf_counter() - begun) * 1e3)
            return times
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        torch.cuda.synchronize(self.device)
        for i, (start, end) in enumerate(pairs):
            self._flush.zero_()
            start.record()
            runs[i % len(runs)]()
            end.record()
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) for start, end in pairs]


def as_graph(run: Run, device: torch.device) -> Run:
    """The callable as one replayable CUDA graph, so that launch gaps of small kernels stay out of the time.

    Args:
        run: launches only, no synchronisation; it is called before capture to compile.
        device: where.
    Returns:
        A replay; on CPU the callable itself.
    """
    if device.type != "cuda":
        return run
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        run()
        run()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def measure_peaks(watch: Stopwatch) -> tuple[Peaks, dict[str, object]]:
    """The device's ceilings: a bf16 matrix product of random 8192 x 8192 matrices, and a device copy of 4 GiB.

    Args:
        watch: of the device; a toy run uses small fp32 matrices.
    Returns:
        The peaks, and both timings for the results.
    """
    size, count = (128, 1 << 18) if watch.toy else (8192, 1 << 31)
    dtype = torch.float32 if watch.device.type == "cpu" else torch.bfloat16
    pairs = [[torch.randn(size, size, device=watch.device, dtype=dtype) for _ in range(2)] for _ in range(2)]
    product = watch.measure([lambda a=a, b=b: a @ b for a, b in pairs])  # type: ignore[misc]
    source = torch.empty(count, device=watch.device, dtype=dtype).normal_()
    target = torch.empty_like(source)
    copy = watch.measure([lambda: target.copy_(source)])
    moved = 2 * source.numel() * source.element_size()
    peaks = Peaks(2 * size**3 / product["ms"] * 1e3, moved / copy["ms"] * 1e3)
    details = {"matmul_size": size, "matmul": product, "copy_bytes": moved, "copy": copy}
    return peaks, {"flops_per_s": peaks.flops, "bytes_per_s": peaks.bandwidth, "dtype": str(dtype)[6:]} | details
