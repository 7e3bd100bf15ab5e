"""Where a model comes from: local folders, the Hub's cache, and what is fetched of a repository."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nha_convert import model_source
from nha_convert.errors import InputError
from nha_convert.model_source import resolve_model
from nha_convert.weights.tensor_files import same_bytes
from nha_convert.weights.weight_files import stored_tensors

ROOT = Path(__file__).resolve().parents[1]

HUB_SCRIPT = """
import sys
from pathlib import Path
from nha_convert.convert import load_student
from nha_convert.errors import InputError
from nha_convert.model_source import resolve_model
from nha_convert.settings import NHASettings
from nha_convert.swap import swap_checkpoint

settings = NHASettings(window=6, slots=8)
print(resolve_model("someone/pico-llama"))
load_student(resolve_model("someone/pico-llama"), settings)
swap_checkpoint("someone/pico-llama", Path(sys.argv[1]), settings, quiet=True)
for name in ("someone/other", "someone/partial"):
    try:
        resolve_model(name)
    except InputError as error:
        print("refused:", error)
"""


def cached(root: Path, name: str, folder: Path) -> Path:
    """Put a model into a Hub cache as the Hub client lays it out: blobs, a snapshot of links, a ref."""
    repo, commit = root / f"models--someone--{name}", "0" * 40
    for sub in ("blobs", f"snapshots/{commit}", "refs"):
        (repo / sub).mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    for file in folder.iterdir():
        shutil.copy(file, repo / "blobs" / f"blob-{file.name}")
        (repo / "snapshots" / commit / file.name).symlink_to(repo / "blobs" / f"blob-{file.name}")
    return repo / "snapshots" / commit


def test_hub_id_in_the_cache_works_offline(pico_llama: Path, tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    snapshot = cached(hub, "pico-llama", pico_llama)
    partial = cached(hub, "partial", pico_llama)
    (partial / "model.safetensors").unlink()
    done = subprocess.run(
        [sys.executable, "-c", HUB_SCRIPT, str(tmp_path / "out")],
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_CACHE": str(hub),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert lines[0] == str(snapshot)
    assert [line.split(":")[1].strip() for line in lines[1:]] == ["someone/other", "someone/partial"]
    assert all("HF_HUB_OFFLINE" in line and "hf download" in line for line in lines[1:])
    written, base = stored_tensors(tmp_path / "out"), stored_tensors(pico_llama)
    assert all(same_bytes(written[name], base[name]) for name in base)
    assert not (tmp_path / "out" / "model-base.safetensors").is_symlink()


def test_pickles_are_asked_of_the_hub_only_where_wanted(
    pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the Hub client keeps what it is asked for."""
    folder = shutil.copytree(pico_llama, tmp_path / "model")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    asked: list[list[str]] = []

    def download(name: str, *, allow_patterns: list[str], **options: Any) -> str:
        if options["local_files_only"]:
            raise FileNotFoundError
        asked.append(allow_patterns)
        assert "consolidated*" in options["ignore_patterns"]
        return str(folder)

    monkeypatch.setattr(model_source, "snapshot_download", download)
    with pytest.raises(InputError, match="lacks config.json or some of its safetensors"):
        resolve_model("someone/pickled")
    assert not any("bin" in pattern for patterns in asked for pattern in patterns)
    assert resolve_model("someone/pickled", pickles=True) == folder
    index = {"weight_map": {"a": "model-1.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="lacks"):
        resolve_model("someone/pickled")


def test_local_names(pico_llama: Path) -> None:
    assert resolve_model(str(pico_llama)) == pico_llama
