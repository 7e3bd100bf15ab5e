"""The acceptance lines of the swap: a large checkpoint against `cp`, and hostile checkpoints."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tools.acceptance_base import ROOT, line, run

PAGE = ROOT / "docs" / "results" / "swap.json"
TARGET_BYTES, TARGET_RATIO = 10**9, 1.5


@line(
    "swap",
    "swap of a sharded 8B-shaped bf16 checkpoint (3B where the disk is short), linked, copied and cut anew",
    "added peak memory <= 1 GB; time <= 1.5x `cp` of the same files",
)
def swap() -> dict[str, Any]:
    from tools.bench_swap import sources

    if not PAGE.exists() or json.loads(PAGE.read_text(encoding="utf-8"))["environment"]["sources"] != sources():
        run([sys.executable, "tools/bench_swap.py"], ROOT)
    got = json.loads(PAGE.read_text(encoding="utf-8"))
    rows = {name: row for name, row in got["rows"].items() if name != "cp"}
    added = {name: row["peak"] - got["baseline"]["peak"] for name, row in rows.items()}
    text = "; ".join(f"{name}: {row['ratio']:.2f}x, +{added[name] / 1e6:.0f} MB" for name, row in rows.items())
    met = max(added.values()) <= TARGET_BYTES and all(row["ratio"] <= TARGET_RATIO for row in rows.values())
    return {"measured": f"{got['shape']}, {got['bytes'] / 1e9:.1f} GB; {text}", "met": met, "values": rows}


@line(
    "hostile",
    "hostile and damaged checkpoints, each through the command line",
    "each refused with exit 2, a line per problem, nothing written, no code run",
)
def hostile() -> dict[str, Any]:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from tests.conftest import make_pico
    from tests.hostile_checkpoints import KINDS

    logging.disable_progress_bar()
    wrong = {}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        good = {False: make_pico("llama", root / "whole")}
        good[True] = shutil.copytree(good[False], root / "sharded", ignore=shutil.ignore_patterns("*.safetensors"))
        AutoModelForCausalLM.from_pretrained(good[False]).save_pretrained(good[True], max_shard_size="100KB")
        for number, (kind, made) in enumerate(KINDS.items()):
            place = root / str(number)
            shutil.copytree(good[made.sharded], place / "model")
            made.damage(place / "model")
            said = _refused(place, ["--allow-pickle"] if made.options else [])
            if said:
                wrong[kind] = said
    text = f"{len(KINDS) - len(wrong)} of {len(KINDS)} kinds refused" + "".join(f"; {k}: {v}" for k, v in wrong.items())
    return {"measured": text, "met": len(KINDS) >= 15 and not wrong, "values": {"kinds": list(KINDS), "wrong": wrong}}


def _refused(place: Path, flags: list[str]) -> str:
    """What is wrong with the refusal of `place/model`; empty if nothing is."""
    from tests.hostile_checkpoints import MARKER

    before = _contents(place)
    command = [sys.executable, str(ROOT / "cli.py"), "swap", "model", "out", *flags]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    lines = done.stderr.splitlines()
    if done.returncode != 2:
        return f"exit {done.returncode}"
    if done.stdout or not lines or not all(text.startswith("error: model") for text in lines):
        return f"said {done.stderr!r}"
    if (place / MARKER).exists():
        return "code was run"
    return "" if _contents(place) == before else "something was written"


def _contents(place: Path) -> list[tuple[str, int, int]]:
    return sorted((str(p), p.lstat().st_size, p.lstat().st_mtime_ns) for p in place.rglob("*"))
