"""Run the GPU tests, then time the kernels beside their floors and the alternatives.

    python kernels/bench/run.py                        everything that fits into 9 minutes, on one CUDA device
    python kernels/bench/run.py --only decode          forward, backward (with forward+backward) or decode alone
    python kernels/bench/run.py --toy                  small sizes on the CPU; TRITON_INTERPRET=1 for the Triton kernels

Writes DATE-DEVICE.json, .md and .png. Exit codes: 0 done; 1 red gate or failure, nothing is written; 2 wrong input.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
if __name__ == "__main__":  # started by path: the packages lie in kernels/, and this folder's names shadow nothing
    sys.path[0] = str(HERE.parent)

import torch  # noqa: E402

from bench import report  # noqa: E402
from bench.contenders import BASELINES  # noqa: E402
from bench.environment import describe  # noqa: E402
from bench.gate import RedGate, run_gpu_tests  # noqa: E402
from bench.gsa import Precompilation  # noqa: E402
from bench.session import Session  # noqa: E402
from bench.targets import judge  # noqa: E402

PARTS = ("forward", "backward", "decode")
PATIENCE = 60.0  # seconds that the timings wait for the GSA chain's compilation after the GPU tests
RESERVE = 20  # seconds of the budget kept for the report
SCHEMA = 1


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="small sizes on the CPU, no GPU tests, no acceptance")
    parser.add_argument("--budget", type=float, default=540, help="seconds for everything (540)")
    parser.add_argument("--only", default=",".join(PARTS), help="comma-separated: forward,backward,decode")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    parser.add_argument("--backend", choices=("triton", "torch"), help="triton where it can run, else torch")
    parser.add_argument(
        "--commit", help="the commit measured, where there is no git (or NHA_COMMIT); HASH or HASH-dirty"
    )
    options = parser.parse_args(arguments)
    options.only = set(options.only.split(","))
    if unknown := options.only - set(PARTS):
        parser.error(f"--only {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    if options.budget <= RESERVE:
        parser.error(f"--budget must be more than {RESERVE} seconds, got {options.budget:g}")
    if not options.toy and not torch.cuda.is_available():
        parser.error("no CUDA device here; --toy runs small sizes on the CPU")
    return options


def new_results(options: argparse.Namespace, device: torch.device, backend: str, command: str) -> dict[str, Any]:
    """Everything but the measurements."""
    return {
        "schema": SCHEMA,
        "toy": options.toy,
        "backend": backend,
        "dtype": "bfloat16" if device.type == "cuda" else "float32",
        "environment": describe(ROOT, device, command, options.commit),
        "gate": {"green": False, "tests": {}, "checks": []},
        "peaks": {},
        "kernels_chosen": {},
        "baselines": {b.name: b.what for b in BASELINES},
        "rows": [],
        "targets": [],
        "not_measured": [],
        "seconds": 0.0,
    }


def main(arguments: list[str] | None = None) -> int:
    """Gate, timings, report.

    Args:
        arguments: of the command line; None takes those of the process.
    Returns:
        The exit code.
    """
    begun = time.monotonic()
    given = sys.argv[1:] if arguments is None else arguments
    options = parse(given)
    if os.environ.pop("NHA_BACKEND", None):
        print("NHA_BACKEND is ignored here: reference and kernels are both needed", file=sys.stderr)
    device = torch.device("cpu" if options.toy else "cuda")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    backend = options.backend or ("triton" if device.type == "cuda" or interpreted else "torch")
    results = new_results(options, device, backend, _shown(given))
    stamp = results["environment"]["date"][:16].replace(":", "").replace("T", "-")
    name = re.sub(r"[^a-z0-9]+", "-", f"{results['environment']['device']}".lower()).strip("-")
    stem = options.out / (f"toy-{stamp}" if options.toy else f"{stamp}-{name}")
    partial = stem.with_name(f"{stem.name}.partial.json")  # kept if the process is killed, gone otherwise

    def save() -> None:
        results["targets"] = judge(results["rows"])
        results["seconds"] = time.monotonic() - begun
        report.write_json(partial, results)

    deadline = begun + options.budget - RESERVE
    try:
        if options.toy:
            results["gate"]["tests"] = {"not_run": "toy run: no CUDA device"}
        else:
            chain = Precompilation(device if options.only & {"forward", "backward"} else torch.device("cpu"))
            patience = 0.0
            try:
                results["gate"]["tests"] = run_gpu_tests(ROOT, deadline - time.monotonic())
                patience = PATIENCE
            finally:
                results["kernels_chosen"]["gsa chain, compiled beforehand"] = chain.finish(patience)
        session = Session(
            results,
            backend=backend,
            device=device,
            toy=options.toy,
            only=options.only,
            deadline=deadline,
            save=save,
        )
        session.run()
    except RedGate as error:
        partial.unlink(missing_ok=True)
        if results["rows"]:  # for whoever looks for the fault; no file keeps them
            print(report.summary(results), file=sys.stderr)
        print(f"The gate is red, nothing is written: {error}", file=sys.stderr)
        return 1
    if not results["peaks"]:
        print("The budget ended before the device's ceilings were measured, nothing is written", file=sys.stderr)
        return 1
    results["gate"]["green"] = True
    finish(stem, results, begun)
    partial.unlink(missing_ok=True)
    return 0


def finish(stem: Path, results: dict[str, Any], begun: float) -> None:
    """Write page, plots and JSON; show the short table."""
    results["targets"] = judge(results["rows"])
    missing = report.plot(stem.with_name(f"{stem.name}.png"), results)
    if missing:
        results["not_measured"].append(missing)
    page = report.markdown(results)
    report.write(stem.with_name(f"{stem.name}.md"), lambda p: p.write_text(page, encoding="utf-8"))
    results["seconds"] = time.monotonic() - begun
    report.write_json(stem.with_name(f"{stem.name}.json"), results)
    print(report.summary(results))
    print(f"{len(results['rows'])} rows, {len(results['not_measured'])} not measured, {results['seconds']:.0f} s")


def _shown(arguments: list[str]) -> str:
    """The command, without this machine's paths."""
    shown = list(arguments)
    for i, word in enumerate(arguments):
        if word == "--out" and i + 1 < len(arguments):
            shown[i + 1] = "DIR"
        elif word.startswith("--out="):
            shown[i] = "--out=DIR"
    return " ".join(["python kernels/bench/run.py", *shown])


if __name__ == "__main__":
    sys.exit(main())
