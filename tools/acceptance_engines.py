"""The acceptance lines of the engines: one step by any number of processes, and runs that are killed and resumed."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tools.acceptance_base import ROOT, line, run

TARGET, KILLS = 1e-5, 10


def _environment() -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "kernels")]
    return {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def _text(path: Path) -> Path:
    """12,000 characters of words in random order."""
    import random

    rng = random.Random(0)
    words = ["".join(rng.choice("abcdefghij") for _ in range(rng.randint(2, 7))) for _ in range(40)]
    path.write_text(" ".join(rng.choice(words) for _ in range(2200))[:12000], encoding="utf-8")
    return path


@line(
    "engines",
    "one optimizer step of align, hidden, distill and finetune: one process, DDP and FSDP2 on 2 ranks (gloo), any cut",
    "loss and gradients <= 1e-5 relative",
)
def engines() -> dict[str, Any]:
    import torch

    from tests.conftest import make_pico

    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        teacher = make_pico("llama", root / "pico")
        script = str(ROOT / "tests" / "train" / "ranks.py")
        run([sys.executable, script, str(teacher), str(root / "1.pt")], root, _environment())
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script]
        run([*launch, str(teacher), str(root / "2.pt")], root, _environment())
        alone, two = (torch.load(root / f"{ranks}.pt", weights_only=False) for ranks in (1, 2))
    worst: dict[str, float] = {}
    for source, ranks in ((alone, 1), (two, 2)):
        for (kind, engine, micro), found in source.items():
            wanted = alone[kind, "ddp", None]
            key = f"{engine}, {ranks} rank{'s' * (ranks > 1)}, {'cut' if micro else 'whole'}"
            worst[key] = max(worst.get(key, 0.0), _difference(found, wanted))
    text = "; ".join(f"{key}: {value:.1e}" for key, value in worst.items())
    return {"measured": text, "met": max(worst.values()) <= TARGET, "values": worst}


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> float:
    """The largest relative difference of losses, and of gradients against each tensor's largest entry."""
    if found["items"] != wanted["items"] or found["gradients"].keys() != wanted["gradients"].keys():
        return float("inf")
    losses = [abs(found["loss"][name] - value) / abs(value) for name, value in wanted["loss"].items()]
    gradients = [
        ((found["gradients"][name] - tensor).abs().max() / tensor.abs().max()).item()
        for name, tensor in wanted["gradients"].items()
    ]
    return max(losses + gradients)


@line(
    "killed",
    f"kill -9 at {KILLS} random moments over align, hidden, distill and finetune, `--resume` each time (CPU)",
    "final weights bit-identical to an uninterrupted run, no item twice, none left out",
)
def killed() -> dict[str, Any]:
    import torch
    from safetensors.torch import load_file

    from tests.conftest import make_pico
    from tests.train import cli_runs

    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        recipe = cli_runs.write_recipe(root / "r.yaml", make_pico("llama", root / "pico"), _text(root / "words.txt"))
        fell = cli_runs.killed_and_resumed(recipe, root / "killed", KILLS, seed=int.from_bytes(os.urandom(4), "big"))
        subprocess.run(cli_runs.command(recipe, root / "whole"), env=cli_runs.environment(), check=True)
        other = []
        for place in sorted((root / "whole" / "stages").glob("*/trained.safetensors")):
            wanted, found = load_file(place), load_file(root / "killed" / place.relative_to(root / "whole"))
            other += [f"{place.parent.name} {key}" for key in wanted if not torch.equal(wanted[key], found[key])]
        seen, wanted_items = cli_runs.items_seen(root / "killed"), list(range(2 * cli_runs.STEPS))
    once = len(seen) == len(cli_runs.STAGES) and all(items == wanted_items for items in seen.values())
    text = (
        f"killed in {', '.join(fell)}; {len(other)} tensors differ; every item of all {len(seen)} stages "
        f"{'once, in order' if once else 'NOT once'}"
    )
    return {"measured": text, "met": not other and once, "values": {"fell": fell, "other": other}}
