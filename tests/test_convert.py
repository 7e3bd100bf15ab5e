"""The swap in memory: what `load_student` refuses."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from nha_convert.convert import load_student
from nha_convert.errors import InputError
from nha_convert.settings import NHASettings
from nha_convert.swap import swap_checkpoint

SETTINGS = NHASettings(window=6, slots=40, sinks=2)


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
        (quantised, "quantised"),
        (no_safetensors, "safetensors"),
        (swapped_already, "NHA model already"),
    ],
)
def test_damaged_models_are_refused(pico_llama: Path, tmp_path: Path, damage: object, words: str) -> None:
    folder = shutil.copytree(pico_llama, tmp_path / "model")
    damage(folder)  # type: ignore[operator]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=words):
        load_student(folder, SETTINGS)
    with pytest.raises(InputError, match=words):
        swap_checkpoint(folder, tmp_path / "deep" / "out", SETTINGS, quiet=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_other_families_are_refused(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_head=2, n_layer=1, vocab_size=64)).save_pretrained(tmp_path / "gpt2")
    before = sorted(tmp_path.rglob("*"))
    for call in (
        lambda: swap_checkpoint(tmp_path / "gpt2", tmp_path / "out", SETTINGS, quiet=True),
        lambda: load_student(tmp_path / "gpt2", SETTINGS),
    ):
        with pytest.raises(InputError, match="gpt2.*llama .*qwen2 .*qwen3"):
            call()
    assert sorted(tmp_path.rglob("*")) == before
