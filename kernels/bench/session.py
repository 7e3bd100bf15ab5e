"""One run: checks each shape, then times it, until the budget ends; what was not reached is named."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from nha_kernels import floors, nha_decode

from . import gsa
from .cases import Case, DecodeCase, Inputs, Shape, make_inputs, make_state, plan
from .contenders import BASELINES, GSA, KINDS, Baseline, callables, check_baseline, decode_sdpa, ours, sdpa_choice
from .gate import LIMITS, RedGate, check_attention, check_decode
from .timing import Run, Stopwatch, as_graph, measure_peaks

MANY = 64 * 1024  # tokens from which two input sets are enough: each is far larger than any cache
DECODE_SETS = 2
ACCEPTANCE_CASES = 8  # that `plan` begins with
BASELINE_SLACK = 5  # a baseline may be this many times less exact than ours has to be: it only has to be the same maths


class OutOfTime(BaseException):
    """The budget ended inside a measurement; no `except Exception` of a library may swallow it."""


@contextmanager
def stopped_after(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` in the block once the seconds are over (main thread only)."""

    def stop(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Session:
    """Measures into `results`; `save` is called after every case."""

    def __init__(
        self,
        results: dict[str, Any],
        *,
        backend: str,
        device: torch.device,
        toy: bool,
        only: set[str],
        deadline: float,
        save: Callable[[], None],
    ) -> None:
        self.results, self.backend, self.device, self.toy = results, backend, device, toy
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.only, self.deadline, self.save = only, deadline, save
        self._known: dict[tuple[Any, ...], dict[str, Any]] = {}  # baseline timings by what they depend on
        self._rows: dict[Case, list[dict[str, Any]]] = {}
        self._checked: set[Any] = set()
        self._sound: dict[tuple[Any, ...], str | None] = {}

    def run(self) -> None:
        """Peaks, then every case in order.

        Raises:
            RedGate: a shape is not correct.
        """
        left: list[tuple[str, Callable[[], None]]] = list(self._plan())
        try:
            with stopped_after(self.deadline - time.monotonic()):
                self.watch = Stopwatch(self.device, self.toy)
                self.peaks, self.results["peaks"] = measure_peaks(self.watch)
                while left:
                    name, measure = left[0]
                    print(name, flush=True)
                    try:
                        measure()
                    except (RuntimeError, MemoryError, NotImplementedError) as error:
                        self._miss(name, f"failed: {_brief(error)}")
                    self.save()
                    left.pop(0)
                    if self.device.type == "cuda":
                        torch.cuda.empty_cache()
        except OutOfTime:
            for name, _ in left:
                self._miss(name, "the time budget ended (an entry measured in part has rows, too)")

    def _plan(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """Names and measurements of the chosen parts; the GSA chain, slow to tune, after the other acceptance cases."""
        waiting: list[Case] = []
        for i, case in enumerate(plan(self.toy)):
            if isinstance(case, DecodeCase):
                if "decode" in self.only:
                    yield _name(case), partial(self.decode, case)
            elif self.only & {"forward", "backward"}:
                yield _name(case), partial(self.attention, case)
                waiting.append(case)
            if i + 1 >= ACCEPTANCE_CASES:
                yield from ((f"{_name(c)}, {GSA}", partial(self.chain, c)) for c in waiting)
                waiting = []
        yield from ((f"{_name(c)}, {GSA}", partial(self.chain, c)) for c in waiting)

    def _miss(self, name: str, reason: str) -> None:
        self.results["not_measured"].append(f"{name}: {reason}")

    def _gate(self, key: Any, check: Callable[[], dict[str, Any]]) -> None:
        """Check a shape before its first timing."""
        if key in self._checked:
            return
        try:
            self.results["gate"]["checks"].append(check())
        except RedGate:
            raise
        except Exception as error:  # whatever a kernel dies of, it is not correct
            raise RedGate(f"{key}: {_brief(error)}") from error
        self._checked.add(key)

    def attention(self, case: Case) -> None:
        """Forward, backward and both of ours, then of every baseline."""
        shape = case.shape
        also = "backward" in self.only
        self._gate(shape, lambda: check_attention(shape, self.backend, self.device, self.dtype, gradients=also))
        sets = self._sets(case)
        rows = self._rows[case] = []
        for kind in KINDS:
            if ("forward" if kind == "forward" else "backward") in self.only:
                rows.append(self._ours(case, kind, sets))
                self.results["rows"].append(rows[-1])
        if self.device.type == "cuda" and "sdpa" not in self.results["kernels_chosen"]:
            self.results["kernels_chosen"]["sdpa"] = sdpa_choice(sets[0])
        for baseline in BASELINES:
            if baseline.name != GSA:
                self._beside(rows, baseline, case, sets)

    def chain(self, case: Case) -> None:
        """The GSA chain beside the rows of a case."""
        chain = next(b for b in BASELINES if b.name == GSA)
        self._beside(self._rows.pop(case, []), chain, case, self._sets(case))

    def _beside(self, rows: list[dict[str, Any]], baseline: Baseline, case: Case, sets: list[Inputs]) -> None:
        """Time a baseline for rows of a case."""
        for row in rows:
            if row["kind"] != "backward":
                entry = self._baseline(baseline, case, row["kind"], sets)
                row["baselines"][baseline.name] = _with_speedup(entry, row["ours"]["ms"])

    def _sets(self, case: Case) -> list[Inputs]:
        """Input sets of a case."""
        return [self._inputs(case, seed) for seed in range(2 if case.tokens > MANY or self.toy else 3)]

    def _ours(self, case: Case, kind: str, sets: list[Inputs]) -> dict[str, Any]:
        """A row without baselines."""
        parts = {"forward": floors.forward, "backward": floors.backward}
        least = [
            floors.floor(work(case.shape, case.time), case.tokens, self.peaks)
            for name, work in parts.items()
            if name in kind.split("+")
        ]
        total = {name: sum(one[name] for one in least) for name in least[0]}
        own = self.watch.measure([callables(ours(case.shape, x, self.backend), kind) for x in sets])
        return {
            "kind": kind,
            "shape": asdict(case.shape),
            "time": case.time,
            "tokens": case.tokens,
            "batch": case.batch,
            "ours": own,
            "floor": total,
            "ratio": own["ms"] / total["ms"],
            "baselines": {},
        }

    def _inputs(self, case: Case, seed: int) -> Inputs:
        return make_inputs(case.shape, case.batch, case.time, device=self.device, dtype=self.dtype, seed=seed)

    def _baseline(self, baseline: Baseline, case: Case, kind: str, sets: list[Inputs]) -> dict[str, Any]:
        """Timing of a baseline, or why there is none."""
        key = (*baseline.key(case), kind)
        if key not in self._known:
            try:
                reason = baseline.unavailable(self.device) or self._too_long(baseline, case.shape)
                if reason is None:  # time, then check: autotuning must see the timed size first
                    runs = [callables(baseline.prepare(case.shape, x), kind) for x in sets]
                    timing = dict(self.watch.measure(runs))
                    reason = self._unsound(baseline, case.shape)
                self._known[key] = timing if reason is None else {"not_available": reason}
                if baseline.name == GSA and kind != "forward":
                    gsa.note_tuned(case.shape)
            except Exception as error:  # of other people's code, which must not end our run
                self._known[key] = {"not_available": f"failed: {_brief(error)}"}
        return self._known[key]

    def _too_long(self, baseline: Baseline, shape: Shape) -> str | None:
        """Autotuning that would eat up what is left of the budget is not begun."""
        if baseline.name != GSA or self.toy:
            return None
        needed, left = gsa.expected_seconds(shape), self.deadline - time.monotonic()
        if needed > left:
            return f"skipped: its autotuning for this shape takes about {needed:.0f} s, {left:.0f} s were left"
        return None

    def _unsound(self, baseline: Baseline, shape: Shape) -> str | None:
        """What is wrong with a baseline's output on a short input, checked once per shape that matters to it."""
        key = (baseline.name, shape.heads, shape.groups, *(getattr(shape, p) for p in baseline.parts))
        if key not in self._sound:
            x = make_inputs(shape, 1, 2 * 128 if not self.toy else 40, device=self.device, dtype=self.dtype, seed=7)
            limit = BASELINE_SLACK * LIMITS[self.dtype][0]
            self._sound[key] = check_baseline(baseline, shape, x, limit)
        return self._sound[key]

    def decode(self, case: DecodeCase) -> None:
        """One step of `layers` layers after each other, as one graph, per layer."""
        self._gate(case, lambda: check_decode(case, self.backend, self.device, self.dtype))
        timing, timed_as = self._in_graph(self._decode_steps(case), case.layers)
        work = floors.decode(case.shape)
        least = floors.floor(work, case.batch, self.peaks)
        row: dict[str, Any] = {
            "kind": "decode",
            "shape": asdict(case.shape),
            "batch": case.batch,
            "context": case.context,
            "ours": timing,
            "timed_as": timed_as,
            "bytes": work.bytes * case.batch,
            "bandwidth_share": work.bytes * case.batch / (timing["ms"] * 1e-3) / self.peaks.bandwidth,
            "floor": least,
            "ratio": timing["ms"] / least["ms"],
            "baselines": {},
        }
        self.results["rows"].append(row)
        row["baselines"]["sdpa, full cache"] = _with_speedup(self._full_cache(case), timing["ms"])

    def _decode_steps(self, case: DecodeCase) -> list[Run]:
        """One callable per input set; the layers' states, shared by them, are together larger than any cache."""
        states = [make_state(case, device=self.device, dtype=self.dtype, seed=layer) for layer in range(case.layers)]

        def step(x: Inputs) -> None:
            for state in states:
                nha_decode(*x[:4], state, cos=x.cos, sin=x.sin, backend=self.backend)

        tokens = [self._inputs(Case(case.shape, 1, case.batch), seed) for seed in range(DECODE_SETS)]
        return [partial(step, x) for x in tokens]

    def _full_cache(self, case: DecodeCase) -> dict[str, Any]:
        """One layer's step of full attention, or why there is none."""
        key = ("full cache", case.shape.heads, case.shape.groups, case.batch, case.context)
        if key not in self._known:
            try:
                step = decode_sdpa(case.shape, case.batch, case.context, self.device, self.dtype)
                self._known[key] = dict(self._in_graph([step], 1)[0])
            except Exception as error:
                self._known[key] = {"not_available": _brief(error)}
        return self._known[key]

    def _in_graph(self, steps: list[Run], per: int) -> tuple[dict[str, float], str]:
        """Timing of steps as CUDA graphs; launched one by one where they cannot be captured."""
        if self.device.type != "cuda":
            return self.watch.measure(steps, per=per), "calls"
        try:
            replays = [as_graph(step, self.device) for step in steps]
        except RuntimeError as error:
            torch.cuda.synchronize(self.device)
            return self.watch.measure(steps, per=per), f"calls (no graph: {_brief(error)})"
        return self.watch.measure(replays, per=per), "graph"


def _brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def _with_speedup(entry: dict[str, Any], ms: float) -> dict[str, Any]:
    return entry | {"speedup": entry["ms"] / ms} if "ms" in entry else entry


def _name(case: Case | DecodeCase) -> str:
    s = case.shape
    sizes = f"{s.model} W {s.window} M {s.slots}"
    if isinstance(case, DecodeCase):
        return f"decode {sizes} batch {case.batch} context {case.context}"
    return f"attention {sizes} tokens {case.tokens} T {case.time}"
