"""Branches alone, in all layers and in one, and memory recovery."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from nha_convert.convert import load_student
from nha_convert.evaluate.ablation import branch_ablation, layer_gains, layer_readers, memory_recovery
from nha_convert.evaluate.nll import compare, logits_of, nll_by_position
from nha_convert.settings import NHASettings

TOKENS = torch.arange(100) * 37 % 251


def test_wide_window_alone_is_the_teacher(pico: Path) -> None:
    student = load_student(pico, NHASettings(window=50, slots=8))
    teacher = nll_by_position(AutoModelForCausalLM.from_pretrained(pico), TOKENS, 50, bos=256)
    result = branch_ablation(student, TOKENS, 50, bos=256)
    for name in ("full", "window"):
        assert result[name]["mean"] == pytest.approx(teacher["mean"], abs=1e-6)
        assert result[name]["buckets"] == pytest.approx(teacher["buckets"], abs=1e-5)
    assert abs(result["slots"]["mean"] - teacher["mean"]) > 1e-3


@torch.no_grad()
def test_branches(pico_llama: Path) -> None:
    student = load_student(pico_llama, NHASettings(window=[6, "full"], slots=8, sinks=2))
    result = branch_ablation(student, TOKENS, 50, bos=256)
    means = [result[name]["mean"] for name in ("full", "window", "slots", "none")]
    assert min(abs(a - b) for index, a in enumerate(means) for b in means[:index]) > 1e-4
    # no attention: the layer adds nothing, the retained full-attention layer is untouched
    without = AutoModelForCausalLM.from_pretrained(pico_llama)
    without.model.layers[0].self_attn.o_proj.weight.zero_()
    expected = nll_by_position(without, TOKENS, 50, bos=256)["mean"]
    assert result["none"]["mean"] == pytest.approx(expected, abs=1e-6)


def test_memory_recovery() -> None:
    assert memory_recovery(3.0, 3.0, 4.0) == 1
    assert memory_recovery(4.0, 3.0, 4.0) == 0
    assert memory_recovery(3.25, 3.0, 4.0) == pytest.approx(0.75)
    assert memory_recovery(5.0, 3.0, 4.0) == -1
    assert memory_recovery(3.0, 3.0, 3.0) is None
    assert memory_recovery(3.1, 3.0, 2.9) is None


@torch.no_grad()
def test_a_layers_slots_masked_alone(pico_llama: Path) -> None:
    """What a reader gives is the model with that one layer's slots masked; the gain is the difference of the means."""
    model = load_student(pico_llama, NHASettings(window=6, slots=8, sinks=2))
    readers = layer_readers(model)
    assert list(readers) == [0, 1]
    ids = TOKENS[:50][None]
    layers = [layer.self_attn for layer in model.model.layers]
    for index, reader in readers.items():
        layers[index].nha_branch = "window"
        expected = model(ids, use_cache=False).logits
        layers[index].nha_branch = "both"
        assert torch.equal(reader(ids), expected)
        assert not torch.equal(expected, model(ids, use_cache=False).logits)
        assert [layer.nha_branch for layer in layers] == ["both", "both"]
    named = {f"layer {index}": reader for index, reader in readers.items()} | {"whole": logits_of(model)}
    measured = compare(named, TOKENS, 20, bos=256, quiet=True)
    gains = layer_gains(measured["whole"], {index: measured[f"layer {index}"] for index in readers})
    for gain in gains:
        masked = measured[f"layer {gain['layer']}"]["nll"]["mean"]
        assert gain["nll"] == masked and gain["nll_gain"] == pytest.approx(masked - measured["whole"]["nll"]["mean"])
        assert gain["interval"][0] < gain["nll_gain"] < gain["interval"][1] and gain["nll_gain"] != 0


def test_layers_without_slots_are_not_masked(pico_llama: Path) -> None:
    assert list(layer_readers(load_student(pico_llama, NHASettings(window=[6, "full"], slots=8)))) == [0]
    assert layer_readers(AutoModelForCausalLM.from_pretrained(pico_llama)) == {}
