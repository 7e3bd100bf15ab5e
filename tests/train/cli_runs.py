"""The command line on a pico model: a recipe with every kind of stage, ranks started by hand, runs killed."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
STEPS = 12
STAGES: list[dict[str, Any]] = [
    {"kind": "align"},
    {"kind": "hidden", "lora": {"rank": 2, "alpha": 4, "dropout": 0.1}},
    {"kind": "distill", "lora": {"rank": 2, "alpha": 4, "dropout": 0.1}},
    {"kind": "finetune", "train": ["gates", "qkvo"]},
]


def write_recipe(path: Path, teacher: Path, text: Path, *, steps: int = STEPS, stages: Any = None, **more: Any) -> Path:
    """A recipe file: rows of 48 tokens, two a step, a checkpoint every four steps, every step in metrics.jsonl."""
    common = {"tokens": steps * 96, "sequence_length": 48, "batch_size": 2, "save_steps": 4}
    settings = {
        "model": str(teacher),
        "output": str(path.parent / "unused"),
        "seed": 3,
        "nha": {"slots": 8, "window": 8, "sinks": 1, "gate_init": "spread"},
        "data": {"sources": [{"source": "text", "path": str(text)}], "held_out_tokens": 256},
        "stages": [{**common, **stage} for stage in stages or STAGES],
        "evaluate": {
            "sequence_length": 64,
            "tokens": 256,
            "recall_pairs": 2,
            "recall_prompts": 2,
            "recall_distances": [2],
            "benchmark_contexts": [64],
            "benchmark_prefill": [],
        },
        "runtime": {"device": "cpu", "threads": 1, "logging_steps": 1, **more},
    }
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def command(recipe: Path, out: Path, *options: str) -> list[str]:
    return [sys.executable, str(ROOT / "cli.py"), "run", str(recipe), "--out", str(out), "--quiet", *options]


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **more}


def start_ranks(count: int, arguments: list[str]) -> list[subprocess.Popen[str]]:
    """Processes as a launcher would start them, but none that watches them: each has to notice on its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    given = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen(arguments, env=environment(**given, RANK=str(rank), LOCAL_RANK=str(rank)), **pipes)
        for rank in range(count)
    ]


def rows(out: Path) -> list[dict[str, Any]]:
    """Whole rows of metrics.jsonl."""
    path = out / "metrics.jsonl"
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def wait_for_row(out: Path, stage: str, step: int, process: subprocess.Popen[str], limit: float = 240) -> bool:
    """Waits until a stage has made a step; false where the process has ended before."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        if any(row["stage"] == stage and row["step"] >= step for row in rows(out)):
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.01)
    raise AssertionError(f"{stage} did not reach step {step} within {limit} s")


def killed_and_resumed(recipe: Path, out: Path, kills: int, seed: int) -> list[str]:
    """Runs a recipe, killing it (`kill -9`) at random steps spread over all stages, resuming each time, to the end.

    Returns:
        Where each kill fell, as `stage:step`.
    """
    rng = random.Random(seed)
    names = [f"{index + 1:02d}-{stage['kind']}" for index, stage in enumerate(STAGES)]
    places = sorted(rng.sample(range(1, len(names) * STEPS), kills))
    fell = []
    for place in places:
        stage, step = names[place // STEPS], place % STEPS + 1
        process = subprocess.Popen(
            command(recipe, out, "--resume"),
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if not wait_for_row(out, stage, step, process):
            raise AssertionError(f"ended by itself: {process.communicate()[1][-3000:]}")
        time.sleep(rng.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        fell.append(f"{stage}:{step}")
    done = subprocess.run(command(recipe, out, "--resume"), env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise AssertionError(f"exit {done.returncode}: {done.stderr[-3000:]}")
    return fell


def items_seen(out: Path) -> dict[str, list[int]]:
    """Every item that each stage has trained on, in the order of its steps."""
    seen: dict[str, list[int]] = {}
    for row in rows(out):
        for first, last in row["items"]:
            seen.setdefault(row["stage"], []).extend(range(first, last + 1))
    return seen
