"""The swap of a checkpoint on disk: what stands there afterwards, however it ended."""

import errno
import fcntl
import json
import os
import pty
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nha_convert.convert import load_student, new_parameter_names
from nha_convert.errors import InputError, WorkError
from nha_convert.settings import NHASettings
from nha_convert.swap import swap_checkpoint
from tests.cli.cli_process import in_a_process
from tests.conftest import FURTHER_MODELS, make_pico

IDS = torch.arange(2 * 40).view(2, 40) * 7 % 251
SETTINGS = NHASettings(window=6, slots=40, sinks=2)
ROOT = Path(__file__).resolve().parents[1]
WAYS: list[dict[str, Any]] = [{}, {"copy": True}, {"max_shard_size": "60KB"}]


def raw_tensors(path: Path) -> dict[str, bytes]:
    """Every tensor's bytes as they stand in a safetensors file."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    spans = {name: entry["data_offsets"] for name, entry in header.items()}
    return {name: data[8 + length + start : 8 + length + end] for name, (start, end) in spans.items()}


def all_tensors(folder: Path) -> dict[str, bytes]:
    return {name: data for file in folder.glob("*.safetensors") for name, data in raw_tensors(file).items()}


def sharded(model: Path, folder: Path, **options: Any) -> Path:
    """A model saved again in shards, its tokenizer with it."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(model, **options).save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("in_shards", [False, True])
def test_swapped_checkpoint_loads_and_keeps_the_base(
    pico: Path, tmp_path: Path, in_shards: bool, way: dict[str, Any]
) -> None:
    source = sharded(pico, tmp_path / "sharded", dtype=torch.bfloat16) if in_shards else pico
    out = tmp_path / "deep" / "out"
    report = swap_checkpoint(source, out, SETTINGS, seed=4, quiet=True, **way)
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True, dtype="auto")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    in_memory = load_student(source, SETTINGS, seed=4)
    assert torch.equal(model(IDS).logits, in_memory(IDS).logits)
    new, before, after = new_parameter_names(model), all_tensors(source), all_tensors(out)
    assert set(after) - set(before) == new
    assert all(after[name] == data for name, data in before.items())
    parameters = dict(model.named_parameters())
    assert report["new_tensors"] == len(new) and report["base_tensors"] == len(before)
    assert report["new_parameters"] == sum(parameters[name].numel() for name in new)
    assert report["bytes"] == sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert report["nha_layers"] == [0, 1] and sorted(p.name for p in out.parent.iterdir()) == ["out"]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(after)
    assert index["metadata"]["total_size"] == sum(map(len, after.values()))


@pytest.mark.parametrize("name", ["qwen3_moe_tied_mixed", "mistral_tied_sliding"])
def test_experts_are_stored_one_by_one(tmp_path: Path, name: str) -> None:
    assert name in FURTHER_MODELS
    base = make_pico(name, tmp_path / "base")
    swap_checkpoint(base, tmp_path / "out", NHASettings(window=6, slots=8), quiet=True, max_shard_size="20KB")
    after = all_tensors(tmp_path / "out")
    assert all(after[tensor] == data for tensor, data in all_tensors(base).items())


def test_links_copies_and_cuts(pico_llama: Path, tmp_path: Path) -> None:
    source = sharded(pico_llama, tmp_path / "source")
    for number, way in enumerate(WAYS):
        swap_checkpoint(source, tmp_path / str(number), SETTINGS, quiet=True, **way)
    shards = sorted(path.name for path in source.glob("*.safetensors"))
    for shard in shards:
        assert (tmp_path / "0" / shard).samefile(source / shard)
        assert not (tmp_path / "1" / shard).samefile(source / shard)
        assert (tmp_path / "1" / shard).read_bytes() == (source / shard).read_bytes()
    cut = list((tmp_path / "2").glob("*.safetensors"))
    largest = max(map(len, all_tensors(source).values()))
    assert len(cut) > len(shards) + 1
    assert all(sum(map(len, raw_tensors(path).values())) <= max(60_000, largest) for path in cut)
    assert {path.name[:10] for path in cut} == {"model-base", "model-nha."}


def test_tokenizer_and_generation_config_travel(pico_llama: Path, tmp_path: Path) -> None:
    swap_checkpoint(pico_llama, tmp_path / "out", SETTINGS, quiet=True)
    text = "two words"
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")(text).input_ids
    assert ids == AutoTokenizer.from_pretrained(pico_llama)(text).input_ids and len(ids) == len(text)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (pico_llama / name).read_bytes()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "nha_llama" and config["architectures"] == ["NHALlamaForCausalLM"]
    assert config["nha_windows"] == [6, 6]
    code = config["auto_map"]["AutoModelForCausalLM"].split(".")[0]
    assert (tmp_path / "out" / f"{code}.py").is_file()


def test_all_full_needs_no_new_tensors(pico_llama: Path, tmp_path: Path) -> None:
    report = swap_checkpoint(pico_llama, tmp_path / "out", NHASettings(window="full"), quiet=True)
    assert report["new_tensors"] == 0 and not (tmp_path / "out" / "model-nha.safetensors").exists()
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    "settings", [NHASettings(window=[4, 4, 4]), NHASettings(full_attention_layers=[2])], ids=["list", "layer"]
)
def test_settings_that_do_not_fit_are_refused(pico_llama: Path, tmp_path: Path, settings: NHASettings) -> None:
    with pytest.raises(InputError, match="nha"):
        swap_checkpoint(pico_llama, tmp_path / "out", settings, quiet=True)
    assert not list(tmp_path.iterdir())


def test_missing_folder_and_full_output_are_refused(pico_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such model folder"):
        swap_checkpoint(tmp_path / "absent", tmp_path / "out", SETTINGS, quiet=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(InputError, match="not an empty folder"):
        swap_checkpoint(pico_llama, tmp_path / "out", SETTINGS, quiet=True)
    with pytest.raises(InputError, match="not an empty folder"):
        swap_checkpoint(pico_llama, tmp_path / "out" / "mine.txt", SETTINGS, quiet=True)
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "mine.txt"]
    (tmp_path / "out" / "mine.txt").unlink()
    swap_checkpoint(pico_llama, tmp_path / "out", SETTINGS, quiet=True)  # an empty folder is fine


@pytest.mark.parametrize("size", ["2", "GB", "-1GB", "0MB", "nanGB", "2 parsecs"])
def test_a_shard_size_that_cannot_be_read(pico_llama: Path, tmp_path: Path, size: str) -> None:
    with pytest.raises(InputError, match="--max-shard-size"):
        swap_checkpoint(pico_llama, tmp_path / "out", SETTINGS, quiet=True, max_shard_size=size)
    assert not list(tmp_path.iterdir())


def test_copies_where_links_are_impossible(pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*args: object) -> None:
        raise OSError("cross-device link")

    monkeypatch.setattr(os, "link", no_links)
    swap_checkpoint(pico_llama, tmp_path / "out", SETTINGS, quiet=True)
    base, copy = pico_llama / "model.safetensors", tmp_path / "out" / "model-base.safetensors"
    assert copy.read_bytes() == base.read_bytes() and not copy.samefile(base)


def test_no_room(pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    for way in ({"copy": True}, {"max_shard_size": "60KB"}):
        with pytest.raises(InputError, match="0.0 GB are free"):
            swap_checkpoint(pico_llama, tmp_path / "out", SETTINGS, quiet=True, **way)
    swap_checkpoint(pico_llama, tmp_path / "out", SETTINGS, quiet=True)  # links take no room


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_disk_that_fills_up_leaves_nothing(
    pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: dict[str, Any]
) -> None:
    written = 0
    write = os.pwrite

    def full_disk(file: int, data: Any, at: int) -> int:
        nonlocal written
        written += len(data)
        if written > 20_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data, at)

    monkeypatch.setattr(os, "pwrite", full_disk)
    with pytest.raises(WorkError, match="No space left on device.*nothing was left"):
        swap_checkpoint(pico_llama, tmp_path / "deep" / "out", SETTINGS, quiet=True, **way)
    assert not list(tmp_path.iterdir())


def test_a_file_that_may_not_grow_fails_the_command(pico_llama: Path, tmp_path: Path) -> None:
    """The kernel itself refuses the write."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), "swap", str(pico_llama), "deep/out", "--copy"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert done.returncode == 1, done.stderr
    assert len(done.stderr.splitlines()) == 1 and "File too large" in done.stderr
    assert not list(tmp_path.iterdir())


STOPPED = """
import signal, sys, time

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits it ignored
import nha_convert.swap
from nha_convert.app import main

def wait(*args):
    print("waiting", flush=True)
    time.sleep(100)

nha_convert.swap.carry_files = wait
sys.argv[1:] = ["swap", sys.argv[1], "deep/out"]
main()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_swap_leaves_nothing_that_looks_finished(pico_llama: Path, tmp_path: Path, number: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED, str(pico_llama)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
    )
    assert process.stdout is not None and process.stdout.readline() == "waiting\n"
    with pytest.raises(InputError, match="another process is writing to it"):
        swap_checkpoint(pico_llama, tmp_path / "deep" / "out", SETTINGS, quiet=True)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert [path.name for path in (tmp_path / "deep").iterdir()] == [".out.partial"]
        (tmp_path / "deep" / ".out.partial" / "folder").mkdir()
    else:
        assert process.returncode == 1 and "interrupted; nothing was left" in errors and len(errors.splitlines()) == 1
        assert not list(tmp_path.iterdir())
    swap_checkpoint(pico_llama, tmp_path / "deep" / "out", SETTINGS, quiet=True)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    assert not (tmp_path / "deep" / "out" / "folder").exists()
    AutoModelForCausalLM.from_pretrained(tmp_path / "deep" / "out")


def test_another_swap_to_the_same_folder_is_not_disturbed(pico_llama: Path, tmp_path: Path) -> None:
    work = tmp_path / ".out.partial"
    work.mkdir()
    (work / "half").write_text("written by the other one")
    lock = os.open(work, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(InputError, match="another process is writing to it"):
        swap_checkpoint(pico_llama, tmp_path / "out", SETTINGS, quiet=True)
    assert (work / "half").exists()
    os.close(lock)
    swap_checkpoint(pico_llama, tmp_path / "out", SETTINGS, quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def pickled(model: Path, folder: Path, *, in_shards: bool = False, **options: Any) -> Path:
    """A model's folder with `pytorch_model*.bin` in place of safetensors, tied tensors sharing memory."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    state = dict(AutoModelForCausalLM.from_pretrained(model).state_dict())
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # as Llama 2's files have it
    if not in_shards:
        torch.save(state, folder / "pytorch_model.bin", **options)
        return folder
    names, weight_map = sorted(state), {}
    for number, part in enumerate((names[::2], names[1::2])):
        shard = f"pytorch_model-{number + 1:05d}-of-00002.bin"
        torch.save({name: state[name] for name in part}, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@torch.no_grad()
@pytest.mark.parametrize("max_shard_size", [None, "60KB"])
@pytest.mark.parametrize("how", ["whole", "shards", "old format"])
@pytest.mark.parametrize("name", ["llama", "qwen3_tied"])
def test_pickles(
    pico_models: dict[str, Path], tmp_path: Path, name: str, how: str, max_shard_size: str | None
) -> None:
    base = pico_models[name]
    options = {"_use_new_zipfile_serialization": False} if how == "old format" else {}
    folder = pickled(base, tmp_path / "model", in_shards=how == "shards", **options)
    report = swap_checkpoint(
        folder, tmp_path / "out", SETTINGS, quiet=True, allow_pickle=True, max_shard_size=max_shard_size
    )
    tied = ["lm_head.weight"] if name.endswith("tied") and how != "shards" else []
    assert report["left_out"] == [*tied, "model.layers.0.self_attn.rotary_emb.inv_freq"]
    after = all_tensors(tmp_path / "out")
    assert all(after[tensor] == data for tensor, data in all_tensors(base).items())
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(model(IDS).logits, load_student(base, SETTINGS)(IDS).logits)
    assert not list((tmp_path / "out").glob("*.bin*"))


def test_pickles_through_the_command(pico_llama: Path, tmp_path: Path) -> None:
    pickled(pico_llama, tmp_path / "model")
    done = in_a_process("swap", "model", "out", "--allow-pickle", "--max-shard-size", "60KB", cwd=tmp_path)
    assert done.returncode == 0 and "left out: model.layers.0.self_attn.rotary_emb.inv_freq" in done.stdout, done.stderr
    assert len(list((tmp_path / "out").glob("model-base-*.safetensors"))) > 2


def on_a_terminal(arguments: list[str], cwd: Path) -> str:
    """What the command line writes to stderr when that is a terminal."""
    ours, theirs = pty.openpty()
    subprocess.run([sys.executable, str(ROOT / "cli.py"), *arguments], cwd=cwd, stderr=theirs, check=True)
    os.close(theirs)
    shown = b""
    while True:
        try:
            block = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        shown += block
        if not block:
            break
    os.close(ours)
    return shown.decode()


def test_progress_is_shown_on_a_terminal_alone(pico_llama: Path, tmp_path: Path) -> None:
    assert "weights" in on_a_terminal(["swap", str(pico_llama), "out"], tmp_path)
    assert on_a_terminal(["swap", str(pico_llama), "quiet", "--quiet"], tmp_path) == ""
    done = in_a_process("swap", pico_llama, "piped", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
