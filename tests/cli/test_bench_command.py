"""`nha-convert bench` on pico models: what it prints and writes, what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
from test_commands import nha_convert

from nha_convert.settings import NHASettings
from nha_convert.swap import swap_checkpoint

QUICK = ["--contexts", "40,64", "--prefill", "32", "--set", "evaluate.benchmark_repeats=3"]


@pytest.fixture(scope="module")
def checkpoint(pico_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench") / "out"
    swap_checkpoint(str(pico_llama), out, NHASettings(window=8, slots=4), quiet=True)
    return out


def test_bench_of_a_checkpoint(checkpoint: Path, pico_llama: Path, tmp_path: Path) -> None:
    before = sorted(path.name for path in checkpoint.iterdir())
    answer = nha_convert("bench", checkpoint, *QUICK, "--json", "numbers.json", cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert "One decoded token" in answer.stdout and "Prefill" in answer.stdout
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert [row["context"] for row in numbers["decode"]] == [40, 64]
    assert numbers["environment"]["versions"]["nha-convert"] and numbers["environment"]["dtype"] == "float32"
    assert sorted(path.name for path in checkpoint.iterdir()) == before  # a checkpoint gets no file
    other = ["--teacher", pico_llama, "--set", "nha.window=4", "--quiet", "--json", "numbers.json"]
    again = nha_convert("bench", checkpoint, *QUICK, *other, cwd=tmp_path)
    assert (again.returncode, again.stdout) == (0, ""), again.stderr
    smaller = json.loads((tmp_path / "numbers.json").read_text())
    assert smaller["teacher"] == str(pico_llama) and smaller["windows"] == [4, 4]
    assert smaller["decode"][0]["cache_bytes"]["student"] < numbers["decode"][0]["cache_bytes"]["student"]
    assert smaller["decode"][0]["cache_bytes"]["teacher"] == numbers["decode"][0]["cache_bytes"]["teacher"]


def test_a_run_folder_gets_bench_json(checkpoint: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(checkpoint, run / "export")
    (run / "recipe.yaml").write_text("model: pico\n")
    answer = nha_convert("bench", "run", *QUICK, "--prefill", "none", cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert "written to run/bench.json; into its page: nha-convert report run" in answer.stdout
    assert json.loads((run / "bench.json").read_text())["prefill"] == []
    report = nha_convert("report", "run", cwd=tmp_path)
    assert report.returncode == 0, report.stderr
    assert "One decoded token" in (run / "report.html").read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--contexts", "1k,far"], "--contexts '1k,far': a count such as 400000, 400k"),
        (["--contexts", "0"], "--contexts '0': a count of at least 1"),
        (["--prefill", "1k,"], "--prefill '1k,': a count such as"),
        (
            ["--set", "stages.align.tokens=1"],
            "--set stages.align.tokens=1: `bench` reads the settings under `evaluate`",
        ),
        (["--set", "nha.slots=1"], "--set nha.slots=1: `bench` changes `nha.window`"),
        (["--set", "evaluate.benchmark_repeats=0"], "evaluate.benchmark_repeats"),
        (["--json", "."], "--json .: is a folder; name a file"),
        (["--device", "cuda:77"], "device: this machine has no cuda:77"),
        (["--teacher", "./nowhere"], "nowhere: no such model folder"),
    ],
)
def test_bad_input(checkpoint: Path, tmp_path: Path, options: list[str], words: str) -> None:
    answer = nha_convert("bench", checkpoint, *options, cwd=tmp_path)
    assert answer.returncode == 2
    assert len(answer.stderr.splitlines()) == 1 and words in answer.stderr, answer.stderr
    assert list(tmp_path.iterdir()) == []


def test_models_that_cannot_be_compared(checkpoint: Path, pico_llama: Path, tmp_path: Path) -> None:
    ordinary = nha_convert("bench", pico_llama, *QUICK, cwd=tmp_path)
    assert ordinary.returncode == 2 and "no layer of it runs NHA" in ordinary.stderr
    full = nha_convert("bench", checkpoint, *QUICK, "--set", "nha.window=full", cwd=tmp_path)
    assert full.returncode == 2 and "no layer of it runs NHA" in full.stderr
    itself = nha_convert("bench", checkpoint, *QUICK, "--teacher", checkpoint, cwd=tmp_path)
    assert itself.returncode == 2 and "is an NHA model itself" in itself.stderr
    missing = nha_convert("bench", tmp_path, *QUICK, cwd=tmp_path)
    assert missing.returncode == 2 and "no checkpoint folder" in missing.stderr
