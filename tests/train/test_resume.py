"""Whatever stops a run, the one that goes on ends with the same bits."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stages import make_recipe, train

from nha_convert.errors import InputError, WorkError
from nha_convert.recipe import Recipe
from nha_convert.settings_types import PAPER_LAYER
from nha_convert.train import checkpoints, trainer
from nha_convert.train.job import StageJob
from nha_convert.train.random_state import random_state, set_random_state

PLACES = ("optimizer:0:4", "step:0:6", "done:0", "step:1:5", "marker:1:8")
TIMES = ("seconds", "tokens_per_second")
ROUTED = {"gate": "routed", "gate_init": "attended"}


def same(tensors: dict[str, torch.Tensor], model: Any) -> None:
    found = model.state_dict()
    assert found.keys() == tensors.keys()
    assert [name for name in tensors if not torch.equal(tensors[name], found[name])] == []


def rows(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what may differ between two runs."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]


def test_killed_in_every_place(pico_llama: Path, text: Path, uninterrupted: dict[str, Any], tmp_path: Path) -> None:
    """One run killed five times, at steps, in the middle of saves and before done.json, then finished."""
    here = Path(__file__).resolve().parent
    paths = [os.environ.get("PYTHONPATH", ""), str(here.parents[1]), str(here.parents[1] / "kernels")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    for place in PLACES:
        command = [sys.executable, str(here / "stages.py"), str(pico_llama), str(tmp_path), str(text), place]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert ended.returncode == -signal.SIGKILL, (place, ended.stderr[-2000:])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "02-distill", "st')
    model, summaries = train(pico_llama, tmp_path, make_recipe(text), resume=True)
    same(uninterrupted["tensors"], model)
    assert rows(tmp_path) == rows(uninterrupted["folder"])
    for mine, theirs in zip(summaries, uninterrupted["summaries"]):
        assert {**mine, "seconds": 0} == {**theirs, "seconds": 0}


def test_folders_from_before_a_setting_are_gone_on_with(tmp_path: Path) -> None:
    """The digest of an old recipe is what it was before routed gates and rotated slots, and theirs are others."""
    stage = {"kind": "align", "tokens": 96, "sequence_length": 48, "batch_size": 2}
    nha = {"slots": 8, "window": 8, "gate_init": "spread"}
    fields = {"model": "pico", "output": "unused", "data": {"sources": [{"source": "stdlib"}]}, "stages": [stage]}

    def digest(**changes: Any) -> str:
        return StageJob(Recipe.model_validate(fields | {"nha": nha | changes}), 0, tmp_path, True).identity()

    assert digest() == "8172647ca78ab321"
    assert digest(layer="paper", gate_init="key") == digest(**PAPER_LAYER) != digest()
    assert len({digest(), digest(slot_rotary=True), digest(gate_init="attended"), digest(**ROUTED)}) == 4
    assert digest(gate_init="attended", gate_init_rows=64) != digest(gate_init="attended")


def stop_at(monkeypatch: pytest.MonkeyPatch, index: int, step: int) -> None:
    """SIGTERM to this process in the middle of a step of stage `index`."""
    real = trainer.NHATrainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.job.index == index and self.state.global_step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(trainer.NHATrainer, "training_step", training_step)


@pytest.mark.parametrize(("index", "name", "steps"), [(0, "01-align", 9), (1, "02-distill", 8)])
def test_sigterm_saves_and_raises(
    pico_llama: Path,
    text: Path,
    uninterrupted: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    index: int,
    name: str,
    steps: int,
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        stop_at(patch, index, 5)
        with pytest.raises(WorkError, match=rf"{name}: stopped by SIGTERM at step 5 of {steps}.*--resume"):
            train(pico_llama, tmp_path, make_recipe(text))
    assert signal.getsignal(signal.SIGTERM) is before
    assert sorted(path.name for path in (tmp_path / "stages" / name).iterdir()) == ["checkpoint-4", "checkpoint-5"]
    model, _ = train(pico_llama, tmp_path, make_recipe(text), resume=True)
    same(uninterrupted["tensors"], model)
    assert rows(tmp_path) == rows(uninterrupted["folder"])


def test_a_finished_stage_is_loaded_not_run(
    pico_llama: Path, text: Path, uninterrupted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def training_step(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("trained again")

    monkeypatch.setattr(trainer.NHATrainer, "training_step", training_step)
    model, summaries = train(pico_llama, uninterrupted["folder"], make_recipe(text), resume=True)
    same(uninterrupted["tensors"], model)
    assert summaries == uninterrupted["summaries"]


def test_work_of_other_settings_is_refused(pico_llama: Path, text: Path, uninterrupted: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="other settings"):
        train(pico_llama, uninterrupted["folder"], make_recipe(text, seed=4), resume=True)


DAMAGES: dict[str, Any] = {
    "no COMPLETE marker": lambda folder: (folder / "COMPLETE").unlink(),
    "COMPLETE is damaged": lambda folder: (folder / "COMPLETE").write_text('{"step": 5, "fil'),
    "optimizer.pt is missing": lambda folder: (folder / "optimizer.pt").unlink(),
    "trained.safetensors has 100 bytes": lambda folder: os.truncate(folder / "trained.safetensors", 100),
    "optimizer.pt has other content": lambda folder: flip(folder / "optimizer.pt"),
}


def flip(path: Path) -> None:
    """Turns one bit over."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def stopped(pico_llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with checkpoints of steps 4 and 5 of the first stage."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(WorkError):
        stop_at(patch, 0, 5)
        train(pico_llama, folder, make_recipe(text))
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_torn_checkpoint_is_named_and_the_one_before_it_taken(
    pico_llama: Path,
    text: Path,
    uninterrupted: dict[str, Any],
    stopped: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: str,
) -> None:
    run_dir = shutil.copytree(stopped, tmp_path / "run")
    DAMAGES[damage](run_dir / "stages/01-align/checkpoint-5")
    found, torn = checkpoints.latest_checkpoint(run_dir / "stages/01-align")
    assert found is not None and found[0].name == "checkpoint-4" and found[1]["step"] == 4
    assert len(torn) == 1 and f"checkpoint-5: torn ({damage}" in torn[0]
    capsys.readouterr()
    model, _ = train(pico_llama, run_dir, make_recipe(text), resume=True)
    said = [line for line in capsys.readouterr().err.splitlines() if "torn" in line]
    assert said == [f"warning: {torn[0]}"]
    same(uninterrupted["tensors"], model)
    assert rows(run_dir) == rows(uninterrupted["folder"])


def test_every_item_is_seen_once(uninterrupted: dict[str, Any]) -> None:
    for stage, steps in (("01-align", 9), ("02-distill", 8)):
        seen = [row["items"] for row in rows(uninterrupted["folder"]) if row["stage"] == stage]
        assert [item for row in seen for first, last in row for item in range(first, last + 1)] == list(
            range(2 * steps)
        )


def test_checkpoints_hold_only_what_learns(pico_llama: Path, text: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from safetensors import safe_open

    seen: dict[str, list[str]] = {}
    real = trainer.finish_checkpoint

    def finish(partial: Path, marker: dict[str, Any]) -> Path:
        assert not (partial / "COMPLETE").exists()
        folder = real(partial, marker)
        with safe_open(folder / "trained.safetensors", "pt") as file:
            seen[folder.parent.name] = list(file.keys())
        files = {path.name for path in folder.iterdir()}
        assert files == {
            "COMPLETE",
            "meter.json",
            "optimizer.pt",
            "random.pt",
            "scheduler.pt",
            "trained.safetensors",
            "trainer_state.json",
        }
        return folder

    monkeypatch.setattr(trainer, "finish_checkpoint", finish)
    train(pico_llama, tmp_path, make_recipe(text))
    assert seen["01-align"] and all(".nha." in name for name in seen["01-align"])
    assert all(".nha." in name or ".lora_" in name for name in seen["02-distill"])
    assert any(".lora_" in name for name in seen["02-distill"])
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert found == [
        "metrics.jsonl",
        "stages/01-align/done.json",
        "stages/01-align/trained.safetensors",
        "stages/02-distill/done.json",
        "stages/02-distill/trained.safetensors",
    ]


def test_a_checkpoint_of_others_runs_no_code(
    pico_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checksums prove that a file is whole, not who wrote it."""
    marker = tmp_path / "ran"

    class Hostile:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {marker}",)

    def write(self: Any, *found: Any) -> None:
        real(self, *found)
        raise WorkError("stopped after the first checkpoint")

    real = trainer.NHATrainer._write_checkpoint
    with monkeypatch.context() as patch, pytest.raises(WorkError, match="stopped after"):
        patch.setattr(trainer, "random_state", Hostile)
        patch.setattr(trainer.NHATrainer, "_write_checkpoint", write)
        train(pico_llama, tmp_path / "run", make_recipe(text))
    with pytest.raises(InputError, match=r"random\.pt: holds more than tensors and numbers"):
        train(pico_llama, tmp_path / "run", make_recipe(text), resume=True)
    assert not marker.exists()


def test_random_states_come_back() -> None:
    random.gauss(0, 1)
    np.random.normal()
    kept = random_state()
    drawn = [(random.random(), random.gauss(0, 1), np.random.normal(), torch.rand(3).tolist()) for _ in range(2)]
    set_random_state(kept)
    again = [(random.random(), random.gauss(0, 1), np.random.normal(), torch.rand(3).tolist()) for _ in range(2)]
    assert again == drawn


def test_other_text_under_the_same_name_is_refused(
    pico_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "mine.txt"
    shutil.copyfile(text, mine)

    def finish(partial: Path, marker: dict[str, Any]) -> None:
        real(partial, marker)
        raise WorkError("stopped after the first checkpoint")

    real = checkpoints.finish_checkpoint
    with monkeypatch.context() as patch, pytest.raises(WorkError, match="stopped after"):
        patch.setattr(trainer, "finish_checkpoint", finish)
        train(pico_llama, tmp_path / "run", make_recipe(mine))
    mine.write_text(mine.read_text()[::-1])
    with pytest.raises(InputError, match=r"checkpoint-4: the text of data.sources is not what its steps were trained"):
        train(pico_llama, tmp_path / "run", make_recipe(mine), resume=True)
    shutil.copyfile(text, mine)
    train(pico_llama, tmp_path / "run", make_recipe(mine), resume=True)
