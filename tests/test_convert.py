"""The swap: what stands on disk afterwards, and what is refused with nothing written."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from nha_convert.convert import load_student, new_parameter_names, resolve_model, swap_checkpoint
from nha_convert.errors import InputError
from nha_convert.settings import NHASettings

IDS = torch.arange(2 * 40).view(2, 40) * 7 % 251
SETTINGS = NHASettings(window=6, slots=40, sinks=2)
ROOT = Path(__file__).resolve().parents[1]


def raw_tensors(path: Path) -> dict[str, bytes]:
    """Every tensor's bytes as they stand in a safetensors file."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    spans = {name: entry["data_offsets"] for name, entry in header.items()}
    return {name: data[8 + length + start : 8 + length + end] for name, (start, end) in spans.items()}


@torch.no_grad()
@pytest.mark.parametrize("shard", [False, True])
def test_swapped_checkpoint_loads_and_keeps_the_base(pico: Path, tmp_path: Path, shard: bool) -> None:
    source = pico
    if shard:
        source = tmp_path / "sharded"
        AutoModelForCausalLM.from_pretrained(pico, dtype=torch.bfloat16).save_pretrained(source, max_shard_size="100KB")
        assert (source / "model.safetensors.index.json").is_file()
    out = tmp_path / "deep" / "out"
    report = swap_checkpoint(source, out, SETTINGS, seed=4, quiet=True)
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True, dtype="auto")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    in_memory = load_student(source, SETTINGS, seed=4)
    assert torch.equal(model(IDS).logits, in_memory(IDS).logits)
    new = new_parameter_names(model)
    before, after = {}, {}
    for folder, tensors in ((source, before), (out, after)):
        for file in folder.glob("*.safetensors"):
            tensors |= raw_tensors(file)
    assert set(after) - set(before) == new == set(load_file(out / "model-nha.safetensors"))
    assert all(after[name] == data for name, data in before.items())
    parameters = dict(model.named_parameters())
    assert report["new_tensors"] == len(new) and report["base_tensors"] == len(before)
    assert report["new_parameters"] == sum(parameters[name].numel() for name in new)
    assert report["nha_layers"] == [0, 1] and sorted(p.name for p in out.parent.iterdir()) == ["out"]


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


def truncated(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-1000])


def truncated_header(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:100])


def without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.v_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def another_width(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 100}))


def quantised(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(config))


def no_safetensors(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def swapped_already(folder: Path) -> None:
    shutil.move(folder, folder.parent / "base")
    swap_checkpoint(folder.parent / "base", folder, SETTINGS, quiet=True)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncated, "truncated"),
        (truncated_header, "truncated"),
        (without_a_tensor, r"layers\.1\.self_attn\.v_proj"),
        (another_width, "shape"),
        (quantised, "quantised"),
        (no_safetensors, "safetensors"),
        (swapped_already, "NHA model already"),
    ],
)
def test_damaged_models_are_refused(pico_llama: Path, tmp_path: Path, damage: object, words: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(pico_llama, folder)
    damage(folder)  # type: ignore[operator]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=words):
        swap_checkpoint(folder, tmp_path / "deep" / "out", SETTINGS, quiet=True)
    if damage is not another_width:  # from_pretrained has its own words for that
        with pytest.raises(InputError, match=words):
            load_student(folder, SETTINGS)
    assert sorted(tmp_path.rglob("*")) == before


def test_other_families_are_refused(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_head=2, n_layer=1, vocab_size=64)).save_pretrained(tmp_path / "gpt2")
    before = sorted(tmp_path.rglob("*"))
    for call in (
        lambda: swap_checkpoint(tmp_path / "gpt2", tmp_path / "out", SETTINGS, quiet=True),
        lambda: load_student(tmp_path / "gpt2", SETTINGS),
    ):
        with pytest.raises(InputError, match="gpt2.*llama, qwen2, qwen3"):
            call()
    assert sorted(tmp_path.rglob("*")) == before


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


def test_a_failure_half_way_leaves_nothing(pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*args: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("nha_convert.convert.save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        swap_checkpoint(pico_llama, tmp_path / "out", SETTINGS, quiet=True)
    assert not list(tmp_path.iterdir())


def test_copies_where_links_are_impossible(pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*args: object) -> None:
        raise OSError("cross-device link")

    monkeypatch.setattr(os, "link", no_links)
    swap_checkpoint(pico_llama, tmp_path / "out", SETTINGS, quiet=True)
    base, copy = pico_llama / "model.safetensors", tmp_path / "out" / "model-base.safetensors"
    assert copy.read_bytes() == base.read_bytes() and not copy.samefile(base)


HUB_SCRIPT = """
import sys
from pathlib import Path
from nha_convert.convert import load_student, resolve_model, swap_checkpoint
from nha_convert.errors import InputError
from nha_convert.settings import NHASettings

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
    assert raw_tensors(tmp_path / "out" / "model-base.safetensors") == raw_tensors(pico_llama / "model.safetensors")
    assert not (tmp_path / "out" / "model-base.safetensors").is_symlink()


def test_local_names(pico_llama: Path) -> None:
    assert resolve_model(str(pico_llama)) == pico_llama
