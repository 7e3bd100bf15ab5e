"""A recipe with routed gates and rotated slots through the command line: run, gone on with, exported."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from cli_runs import ROOT, command, environment, write_recipe
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

SET = ("--set", "nha.gate=routed", "--set", "nha.gate_init=attended", "--set", "nha.slot_rotary=true")


def test_a_routed_run(pico_llama: Path, text: Path, tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path / "recipe.yaml", pico_llama, text, steps=4, stages=[{"kind": "align"}, {"kind": "distill"}]
    )
    out = tmp_path / "run"
    finals = []
    for again in ((), ("--resume",)):
        done = subprocess.run(command(recipe, out, *SET, *again), env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        finals.append(load_file(out / "export" / "model.safetensors"))
        if not again:  # what the second call has to make anew, from the same gates and the first stage
            shutil.rmtree(out / "stages" / "02-distill")
            shutil.rmtree(out / "export")
            (out / "eval.json").unlink()
    first, second = finals
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    started = load_file(out / "gates.safetensors")
    written = [name for name in started if ".write_proj." in name]
    assert len(written) == 2 * 2 and all(not torch.equal(started[name], first[name]) for name in written)

    exported = subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), "export", str(out), str(tmp_path / "again")],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert exported.returncode == 0, exported.stderr[-3000:]
    config = json.loads((tmp_path / "again" / "config.json").read_text(encoding="utf-8"))
    assert config["nha_gate"] == "routed" and config["nha_slot_rotary"] is True
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    loaded = dict(model.named_parameters())
    assert all(torch.equal(loaded[name], first[name]) for name in written)
