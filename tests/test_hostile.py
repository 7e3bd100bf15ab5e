"""Hostile and damaged checkpoints are refused: one line each, nothing written, no code run."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM

from nha_convert.errors import InputError
from nha_convert.settings import NHASettings
from nha_convert.swap import swap_checkpoint
from nha_convert.weights.weight_files import check_weights, read_header
from tests.cli.cli_process import in_a_process
from tests.hostile_checkpoints import KINDS, MARKER, Kind

SETTINGS = NHASettings(window=6, slots=8)
THROUGH_THE_COMMAND = [
    "data truncated",
    "tensors overlap",
    "NaN",
    "index leads out by ../",
    "a billion layers",
    "config.json with code of its own",
    "pickle without the flag",
    "pickle that runs code",
]


@pytest.fixture(scope="module")
def good(pico_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """A good model in one file, and the same in shards."""
    folder = shutil.copytree(pico_llama, tmp_path_factory.mktemp("sharded") / "model")
    (folder / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(pico_llama).save_pretrained(folder, max_shard_size="100KB")
    return {False: pico_llama, True: folder}


def place(kind: Kind, good: dict[bool, Path], root: Path) -> Path:
    folder = shutil.copytree(good[kind.sharded], root / "model")
    kind.damage(folder)
    return folder


def contents(root: Path) -> list[tuple[str, int, int]]:
    return sorted((str(p.relative_to(root)), p.lstat().st_size, p.lstat().st_mtime_ns) for p in root.rglob("*"))


@pytest.mark.parametrize("sharded", [False, True])
def test_what_is_damaged_below_is_good(good: dict[bool, Path], tmp_path: Path, sharded: bool) -> None:
    folder = place(Kind(lambda folder: None, "", sharded), good, tmp_path)
    assert len(list(folder.glob("*.safetensors"))) > 2 * sharded
    swap_checkpoint(folder, tmp_path / "out", SETTINGS, quiet=True)


@pytest.mark.parametrize("name", KINDS)
def test_is_refused(good: dict[bool, Path], tmp_path: Path, name: str) -> None:
    kind = KINDS[name]
    folder = place(kind, good, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(InputError) as caught:
        swap_checkpoint(folder, tmp_path / "deep" / "out", SETTINGS, quiet=True, **kind.options)
    lines = str(caught.value).splitlines()
    assert any(kind.words in line for line in lines), lines
    assert all(str(folder) in line and line.isprintable() for line in lines), lines
    assert contents(tmp_path) == before
    assert not (tmp_path / MARKER).exists()


@pytest.mark.parametrize("name", THROUGH_THE_COMMAND)
def test_the_command_refuses(good: dict[bool, Path], tmp_path: Path, name: str) -> None:
    kind = KINDS[name]
    place(kind, good, tmp_path)
    before = contents(tmp_path)
    flags = ["--allow-pickle"] if kind.options else []
    done = in_a_process("swap", "model", "out", *flags, cwd=tmp_path)
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and done.stdout == "", done.stderr
    assert len(lines) == 1 and lines[0].startswith("error: ") and kind.words in lines[0], done.stderr
    assert contents(tmp_path) == before
    assert not (tmp_path / MARKER).exists()


@pytest.mark.parametrize("name", ["tensor twice in a header", "a billion layers", "shard a named pipe"])
def test_run_refuses_as_well(good: dict[bool, Path], tmp_path: Path, name: str) -> None:
    place(KINDS[name], good, tmp_path)
    before = contents(tmp_path)
    done: subprocess.CompletedProcess[str] = in_a_process("run", "model", "--dry-run", cwd=tmp_path)
    assert done.returncode == 2 and KINDS[name].words in done.stderr, done.stderr
    assert contents(tmp_path) == before


def test_code_beside_a_known_model_is_not_run(pico_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pico_llama, tmp_path / "model")
    found = json.loads((folder / "config.json").read_text())
    found["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(found))
    (folder / "evil.py").write_text(f"open({str(tmp_path / MARKER)!r}, 'w')\n")
    swap_checkpoint(folder, tmp_path / "out", SETTINGS, quiet=True)
    assert not (tmp_path / MARKER).exists() and not (tmp_path / "out" / "evil.py").exists()


HEADERS = [name for name, kind in KINDS.items() if kind.words and not kind.sharded and not kind.options]


@pytest.mark.parametrize("name", HEADERS)
def test_no_laxer_than_safetensors(good: dict[bool, Path], tmp_path: Path, name: str) -> None:
    """What safetensors itself refuses to open, the header check refuses too."""
    path = place(KINDS[name], good, tmp_path) / "model.safetensors"
    if not path.is_file():
        pytest.skip("no safetensors file")
    try:
        with safe_open(path, "pt") as file:
            names = set(file.keys())
    except SafetensorError:
        with pytest.raises(InputError):
            read_header(path)
        return
    try:
        assert set(read_header(path)) == names
    except InputError as error:
        assert name in ("tensor twice in a header",), error


def test_a_hub_snapshot_may_link_to_its_blobs(pico_llama: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for file in pico_llama.iterdir():
        shutil.copy(file, repository / "blobs" / f"x-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/x-{file.name}")
    assert set(check_weights(snapshot)) == set(read_header(pico_llama / "model.safetensors"))
    shutil.copy(pico_llama / "model.safetensors", tmp_path / "other")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../../other")
    with pytest.raises(InputError, match="a link that leaves"):
        check_weights(snapshot)


def test_fewer_lines_than_problems(pico_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pico_llama, tmp_path / "model")
    found = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(found | {"head_dim": 32, "intermediate_size": 95}))
    with pytest.raises(InputError) as caught:
        swap_checkpoint(folder, tmp_path / "out", SETTINGS, quiet=True)
    lines = str(caught.value).splitlines()
    assert len(lines) == 11 and "more problems" in lines[-1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_finite_anywhere(pico_llama: Path, tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    model = AutoModelForCausalLM.from_pretrained(pico_llama).to(dtype)
    model.save_pretrained(tmp_path / "whole")
    swap_checkpoint(tmp_path / "whole", tmp_path / "out", SETTINGS, quiet=True)
    with torch.no_grad():
        model.lm_head.weight[-1, -1] = value
    model.save_pretrained(tmp_path / "model")
    for options in ({}, {"copy": True}, {"max_shard_size": "50KB"}):
        with pytest.raises(InputError, match=r"lm_head\.weight holds NaN or infinity"):
            swap_checkpoint(tmp_path / "model", tmp_path / "none", SETTINGS, quiet=True, **options)
    assert not (tmp_path / "none").exists()
