"""What goes wrong is named, kept within bounds, and can be gone on from."""

import errno
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runs import command, environment, items_seen, killed_and_resumed, start_ranks, wait_for_row, write_recipe
from safetensors.torch import load_file
from stages import make_recipe, train

from nha_convert.errors import InputError, WorkError
from nha_convert.train import trainer
from nha_convert.train.checkpoints import begin_checkpoint, latest_checkpoint
from nha_convert.train.faults import check_reporting, is_full_disk
from nha_convert.train.objectives import AlignObjective, DistillObjective

FULL = Path("/dev/full")


# ---- one process ---------------------------------------------------------------------------------
@pytest.mark.skipif(not FULL.exists(), reason="needs the device that is always full")
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "random.pt", "meter.json"])
def test_a_full_disk_is_named_and_the_last_checkpoint_kept(
    pico_llama: Path,
    text: Path,
    uninterrupted: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """The second checkpoint meets a file to which the system writes nothing: no space left on device."""

    def begin(folder: Path, step: int) -> Path:
        partial = begin_checkpoint(folder, step)
        if step == 8:
            (partial / name).symlink_to(FULL)
        return partial

    with monkeypatch.context() as patch, pytest.raises(WorkError) as caught:
        patch.setattr(trainer, "begin_checkpoint", begin)
        train(pico_llama, tmp_path, make_recipe(text))
    said = str(caught.value)
    assert "\n" not in said and "stage 01-align: no space left on the disk of" in said
    assert "for the checkpoint of step 8" in said and "checkpoint-4 is kept" in said and "--resume" in said
    assert [path.name for path in (tmp_path / "stages/01-align").iterdir()] == ["checkpoint-4"]
    model, _ = train(pico_llama, tmp_path, make_recipe(text), resume=True)
    found = model.state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in uninterrupted["tensors"].items())


def test_a_small_disk_that_fills_up(pico_llama: Path, text: Path, tmp_path: Path) -> None:
    """A file system of its own with room for one checkpoint and a half."""

    def stop(partial: Path, marker: Any) -> None:
        raise WorkError("measured")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(WorkError):
        patch.setattr(trainer, "finish_checkpoint", stop)
        train(pico_llama, tmp_path / "sized", make_recipe(text))
    size = sum(-(-path.stat().st_size // 4096) * 4096 for path in (tmp_path / "sized").rglob("*") if path.is_file())
    place = tmp_path / "small"
    place.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={size * 3 // 2}", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("may not mount a file system here")
    try:
        with pytest.raises(WorkError, match=r"no space left on the disk of .* step 8; .*checkpoint-4 is kept"):
            train(pico_llama, place, make_recipe(text))
        assert [path.name for path in (place / "stages/01-align").iterdir()] == ["checkpoint-4"]
        assert latest_checkpoint(place / "stages/01-align")[1] == []
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_only_a_full_disk_is_a_full_disk() -> None:
    assert is_full_disk(OSError(errno.ENOSPC, "No space left on device"))
    assert is_full_disk(OSError(errno.EDQUOT, "Disk quota exceeded"))
    assert not is_full_disk(PermissionError(errno.EACCES, "Permission denied"))
    assert not is_full_disk(RuntimeError("shape mismatch"))


@pytest.mark.parametrize(
    ("kind", "index", "name"), [(AlignObjective, 0, "01-align"), (DistillObjective, 1, "02-distill")]
)
def test_a_loss_that_is_no_number_names_the_layer_and_keeps_the_checkpoint(
    pico_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, index: int, name: str
) -> None:
    real = kind.sums

    def sums(self: Any, batch: Any) -> Any:
        if self.step == 5:
            with torch.no_grad():
                self.model.model.layers[1].self_attn.nha.gate_proj.weight[0, 0] = float("nan")
        return real(self, batch)

    monkeypatch.setattr(kind, "sums", sums)
    with pytest.raises(
        WorkError, match=rf"stage {name}, step 6: the loss is not finite, worst in layer 1; lower stages"
    ):
        train(pico_llama, tmp_path, make_recipe(text))
    assert [path.name for path in (tmp_path / "stages" / name).iterdir()] == ["checkpoint-4"]
    trained = load_file(tmp_path / "stages" / name / "checkpoint-4" / "trained.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in trained.values())


def test_no_memory_names_what_makes_the_batch_smaller(
    pico_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sums(self: Any, batch: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(AlignObjective, "sums", sums)
    with pytest.raises(WorkError, match=r"01-align: .* does not hold 2 x 48 tokens .*lower runtime.micro_batch"):
        train(pico_llama, tmp_path, make_recipe(text))


def test_a_logger_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_reporting("none")
    with pytest.raises(InputError, match=r"runtime.report_to: wandb is not installed; pip install wandb"):
        check_reporting("wandb")


# ---- several processes ---------------------------------------------------------------------------
LONG = [{"kind": "distill", "lora": {"rank": 2, "alpha": 4}}]


@pytest.fixture
def long_recipe(pico_llama: Path, text: Path, tmp_path: Path) -> Path:
    """A stage that takes minutes, and ranks that may be silent for 8 seconds."""
    return write_recipe(tmp_path / "long.yaml", pico_llama, text, steps=100_000, stages=LONG, rank_timeout=8.0)


@pytest.mark.slow
@pytest.mark.parametrize(("dead", "how"), [(1, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_a_lost_rank_ends_the_others(long_recipe: Path, tmp_path: Path, dead: int, how: signal.Signals) -> None:
    """Killed, or stopped so that it is silent: the other one says which, within a bounded time, and exits with 1."""
    out = tmp_path / "run"
    ranks = start_ranks(2, command(long_recipe, out))
    try:
        assert wait_for_row(out, "01-distill", 6, ranks[0]), ranks[0].communicate()[1][-3000:]
        ranks[dead].send_signal(how)
        started = time.monotonic()
        said = ranks[1 - dead].communicate(timeout=60)[1]
        assert time.monotonic() - started < 8 + 5 + 15  # timeout, roll call, the interpreter's end
        assert ranks[1 - dead].returncode == 1, said
        errors = [line for line in said.splitlines() if line.startswith("error:")]
        assert len(errors) == 1 and f"stage 01-distill: rank {dead} of 2 is gone or has not answered" in errors[0]
        assert "Traceback" not in said
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
    assert (out / "stages/01-distill").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_sigterm_to_one_rank_stops_all_at_one_step_and_another_number_goes_on(
    pico_llama: Path, text: Path, tmp_path: Path, engine: str
) -> None:
    """Saved by two ranks, finished by one: every item once, the same as one process to rounding."""
    stages = [{"kind": "align"}, {"kind": "distill", "lora": {"rank": 2, "alpha": 4}}]
    recipe = write_recipe(tmp_path / "r.yaml", pico_llama, text, steps=300, stages=stages)
    out = tmp_path / "run"
    ranks = start_ranks(2, command(recipe, out, "--set", f"runtime.engine={engine}"))
    assert wait_for_row(out, "01-align", 5, ranks[0])
    ranks[1].send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=120)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [1, 1], said
    assert [line.count("stopped by SIGTERM at step") for line in said] == [1, 0]
    done = subprocess.run(command(recipe, out, "--resume"), env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    alone = subprocess.run(command(recipe, tmp_path / "alone"), env=environment(), capture_output=True, text=True)
    assert alone.returncode == 0, alone.stderr
    assert items_seen(out) == {"01-align": list(range(600)), "02-distill": list(range(600))}
    wanted = load_file(tmp_path / "alone/stages/01-align/trained.safetensors")
    found = load_file(out / "stages/01-align/trained.safetensors")
    for name, tensor in wanted.items():  # rounding, which Adam makes a share of the rate
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0.05 * 0.02)


@pytest.mark.slow
def test_killed_at_random_over_all_stages(pico_llama: Path, text: Path, tmp_path: Path) -> None:
    """`kill -9` in every kind of stage through the command line: the same bits, no item twice, none left out."""
    recipe = write_recipe(tmp_path / "r.yaml", pico_llama, text)
    fell = killed_and_resumed(recipe, tmp_path / "killed", kills=4, seed=os.getpid())
    whole = subprocess.run(command(recipe, tmp_path / "whole"), env=environment(), capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    places = sorted((tmp_path / "whole/stages").glob("*/trained.safetensors"))
    assert len(places) == 4
    for place in places:
        wanted, found = load_file(place), load_file(tmp_path / "killed" / place.relative_to(tmp_path / "whole"))
        assert wanted.keys() == found.keys()
        assert all(torch.equal(wanted[name], found[name]) for name in wanted), (place, fell)
    assert items_seen(tmp_path / "killed") == items_seen(tmp_path / "whole")
    assert all(items == list(range(24)) for items in items_seen(tmp_path / "whole").values())
    first, second = (json.loads((tmp_path / name / "eval.json").read_text()) for name in ("killed", "whole"))
    assert first["final"]["nll"] == second["final"]["nll"]
