"""What a converted model costs beside its teacher: seconds per decoded token, seconds of a prefill, bytes of cache.

Teacher and student take turns in one process, so that what slows the machine slows both. Batch 1 throughout.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from nha_kernels.state import NHAState
from transformers import DynamicCache

from nha_convert.evaluate.bootstrap import CONFIDENCE
from nha_convert.evaluate.nll import evaluating
from nha_convert.modeling.attention_nha import nha_layers, teacher_mode
from nha_convert.settings import EvaluateSettings

MODES = ("teacher", "student")
WARM_UP = 3
"""Untimed decode steps of each before the first timed one."""
PREFILLS = 6
"""Timed prefills of each per length: the fewest whose median has a 95 % interval."""
LEAST_TURNS = 6
"""Timed turns, however long they take."""
LAID_DOWN = 4
"""Windows of real tokens that a filled cache begins with."""


def timed(work: Callable[[], Any], device: torch.device | None = None) -> float:
    """Seconds of one run, waiting for an accelerator's queue before and after."""
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device | None) -> None:
    if device is not None and device.type != "cpu":
        torch.accelerator.synchronize(device)


def prefill(model: Any, ids: torch.Tensor, chunk: int) -> DynamicCache:
    """Read `ids` [1,T] into a new cache, `chunk` tokens per call, with the last token's logits alone."""
    cache = new_cache(model)
    for part in ids.split(chunk, 1):
        model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def new_cache(model: Any) -> DynamicCache:
    """The cache of a model in its present mode; an ordinary model's is transformers' `DynamicCache`."""
    made: DynamicCache = model.new_cache() if hasattr(model, "new_cache") else DynamicCache(config=model.config)
    return made


def filled_cache(model: Any, context: int) -> DynamicCache:
    """A cache as after `context` tokens, without reading so many.

    The model reads a few windows of random tokens, which fills all that an NHA layer has; such a layer's position is
    then moved to the context. Layers with keys and values of their own get random ones for the rest. For timing alone.
    """
    windows = [layer.nha_window or 0 for _, layer in nha_layers(model)]
    read = min(context, LAID_DOWN * max([16, *windows]))
    generator = torch.Generator(model.device).manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (1, read), generator=generator, device=model.device)
    cache = prefill(model, ids, read)
    for layer in cache.layers:
        if hasattr(layer, "state"):
            layer.seen = context
            layer.state.seen.fill_(context)
        elif context > read:
            layer.update(*(_random_like(x, context - read, generator) for x in (layer.keys, layer.values)))
            layer.keys, layer.values = layer.keys.clone(), layer.values.clone()  # a sliding layer keeps a view of all
    return cache


def _random_like(x: torch.Tensor, tokens: int, generator: torch.Generator) -> torch.Tensor:
    """[B,G,tokens,D] of the dtype of `x` [B,G,T,D], where it is."""
    return torch.randn(*x.shape[:2], tokens, x.shape[3], generator=generator, dtype=x.dtype, device=x.device)


def cache_bytes(cache: DynamicCache) -> int:
    """Bytes of every tensor that the cache holds."""
    total = 0
    for layer in cache.layers:
        state: NHAState | None = getattr(layer, "state", None)
        tensors = (layer.keys, layer.values) if state is None else state.tensors().values()
        total += sum(x.numel() * x.element_size() for x in tensors)
    return total


Models = dict[str, Any]
"""The model that answers for each of `MODES`; one object may stand for both."""


@contextlib.contextmanager
def _as(models: Models, mode: str) -> Iterator[Any]:
    model = models[mode]
    with teacher_mode(model) if mode == "teacher" else contextlib.nullcontext():
        yield model


def measure(
    student: Any, settings: EvaluateSettings, *, teacher: Any | None = None, say: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Decode steps, prefills and caches of both models at `settings.benchmark_contexts` and `benchmark_prefill`.

    Args:
        student: an NHA model.
        settings: only those whose names begin with `benchmark`.
        teacher: an ordinary model of its own on the same device; None takes `student` in teacher mode, which computes
            what the teacher does (its weights may differ, its costs do not).
        say: receives a line per measurement.
    Returns:
        {"decode": [{"context", "teacher", "student", "ratio", "cache_bytes": {mode: bytes}}, ...], "prefill":
        [{"tokens", "teacher", "student", "ratio"}, ...], "left_out": [{"what", "context", "reason"}, ...]}; times are
        `summary`s in seconds, `ratio` is one of teacher / student, and on a CUDA device rows have "working_bytes".
    """
    models = {"student": student, "teacher": student if teacher is None else teacher}
    left_out: list[dict[str, Any]] = []
    result: dict[str, Any] = {"decode": [], "prefill": [], "left_out": left_out}
    with torch.inference_mode(), evaluating(*models.values()):
        for kind, work, contexts in (
            ("decode", measure_decode, settings.benchmark_contexts),
            ("prefill", measure_prefill, settings.benchmark_prefill),
        ):
            for context in sorted(set(contexts)):
                reason = _expected(result["prefill"], context, settings) if kind == "prefill" else None
                row = reason or _within_memory(work, models, context, settings)
                if isinstance(row, str):
                    left_out.append({"what": kind, "context": context, "reason": row})
                    say(f"{kind} at {context}: left out, {row}")
                else:
                    result[kind].append(row)
                    both = ", ".join(f"{mode} {row[mode]['median'] * 1e3:.2f} ms" for mode in MODES)
                    say(f"{kind} at {context}: {both}")
    return result


def _within_memory(
    work: Callable[[Models, int, EvaluateSettings], dict[str, Any]], models: Models, context: int, settings: Any
) -> dict[str, Any] | str:
    """The row, or why there is none."""
    try:
        return work(models, context, settings)
    except torch.OutOfMemoryError:
        return "too little memory"
    except RuntimeError as error:
        if "not enough memory" in str(error):  # the allocator of CPUs
            return "too little memory"
        raise


def measure_decode(models: Models, context: int, settings: EvaluateSettings) -> dict[str, Any]:
    """One decoded token after `context` others, step by step in turns, and the bytes of both caches."""
    device = models["student"].device
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    caches: dict[str, DynamicCache] = {}
    for mode in MODES:
        with _as(models, mode) as model:
            caches[mode] = filled_cache(model, context)
    sizes = {mode: cache_bytes(cache) for mode, cache in caches.items()}

    def step(mode: str) -> tuple[float, int | None]:
        with _as(models, mode) as model, _working_memory(device) as peak:
            seconds = timed(lambda: model(token, past_key_values=caches[mode], use_cache=True), device)
        return seconds, peak()

    for _ in range(WARM_UP):
        for mode in MODES:
            step(mode)
    turns = _turns(step, settings.benchmark_repeats, settings.benchmark_seconds)
    return {"context": context, **turns, "cache_bytes": sizes}


def measure_prefill(models: Models, tokens: int, settings: EvaluateSettings) -> dict[str, Any]:
    """A prefill of random tokens in one call, in turns; a short one warms up."""
    device = models["student"].device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, models["student"].config.vocab_size, (1, tokens), generator=generator).to(device)

    def read(mode: str, ids: torch.Tensor = ids) -> tuple[float, int | None]:
        with _as(models, mode) as model, _working_memory(device) as peak:
            seconds = timed(lambda: prefill(model, ids, ids.shape[1]), device)
        return seconds, peak()

    for mode in MODES:
        read(mode, ids[:, :256])
    return {"tokens": tokens, **_turns(read, PREFILLS, settings.benchmark_seconds)}


def _turns(work: Callable[[str], tuple[float, int | None]], repeats: int, limit: float) -> dict[str, Any]:
    """Teacher and student by turns, `repeats` times each, fewer where more than `limit` seconds have passed."""
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    working: dict[str, list[int]] = {mode: [] for mode in MODES}
    started = time.perf_counter()
    for turn in range(repeats):
        if turn >= LEAST_TURNS and time.perf_counter() - started > limit:
            break
        for mode in MODES:
            duration, peak = work(mode)
            seconds[mode].append(duration)
            if peak is not None:
                working[mode].append(peak)
    peaks = {mode: max(found) for mode, found in working.items() if found}
    return in_turns(seconds) | ({"working_bytes": peaks} if peaks else {})


def in_turns(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """{mode: `summary` of its seconds}, and "ratio": one of teacher / student, the n-th run of each being a turn."""
    ratios = [teacher / student for teacher, student in zip(seconds["teacher"], seconds["student"], strict=True)]
    return {mode: summary(seconds[mode]) for mode in MODES} | {"ratio": summary(ratios)}


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median of independent runs, with a confidence interval that supposes nothing of their distribution.

    Returns:
        {"median", "low", "high", "confidence", "runs"}: low and high are runs, the k-th from below and above, so that
        the true median lies between them with at least 95 %; fewer than six runs have their smallest and largest, and
        a lower `confidence` (0 for a single run).
    Source: the sign test inverted, as in W. J. Conover, Practical Nonparametric Statistics, section 3.2.
    """
    ordered, runs = sorted(values), len(values)
    below, missed = 1, 2  # the run that the interval begins with; orders of all 2^runs that it misses on either side
    while (more := missed + 2 * math.comb(runs, below)) / 2**runs <= 1 - CONFIDENCE:
        below, missed = below + 1, more
    low, high = ordered[below - 1], ordered[-below]
    return {
        "median": statistics.median(ordered),
        "low": low,
        "high": high,
        "confidence": max(0.0, 1 - missed / 2**runs),
        "runs": runs,
    }


def _expected(measured: list[dict[str, Any]], tokens: int, settings: EvaluateSettings) -> str | None:
    """Why a prefill is left out: it would take too long, by the growth between the two before it, or linear growth."""
    if not measured:
        return None
    seconds = [sum(row[mode]["median"] for mode in MODES) for row in measured[-2:]]
    power = 1.0
    if len(measured) > 1:
        power = math.log(seconds[1] / seconds[0]) / math.log(measured[-1]["tokens"] / measured[-2]["tokens"])
    turns = PREFILLS * seconds[-1] * (tokens / measured[-1]["tokens"]) ** min(2.0, max(1.0, power))
    if turns <= settings.benchmark_seconds:
        return None
    return f"would take about {turns:.0f} s, more than evaluate.benchmark_seconds {settings.benchmark_seconds:g}"


@contextlib.contextmanager
def _working_memory(device: torch.device) -> Iterator[Callable[[], int | None]]:
    """Inside, what is allocated at most beyond what was there before; None where the device does not count it."""
    if device.type != "cuda":
        yield lambda: None
        return
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    yield lambda: torch.cuda.max_memory_allocated(device) - before
