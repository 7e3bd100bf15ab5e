"""Branches alone, memory recovery, and the slots' share of the softmax."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from nha_convert.convert import load_student
from nha_convert.evaluate.ablation import branch_ablation, memory_recovery, slot_mass
from nha_convert.evaluate.nll import nll_by_position
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


def test_slot_mass_without_absorption_is_zero(pico: Path) -> None:
    layers = slot_mass(load_student(pico, NHASettings(window=50, slots=8)), TOKENS, 50, bos=256)
    assert [layer["layer"] for layer in layers] == [0, 1]
    assert all(layer["mean"] == 0 and set(layer["buckets"].values()) == {0.0} for layer in layers)


def test_slot_mass_of_a_pure_memory_is_one(pico_llama: Path) -> None:
    layers = slot_mass(load_student(pico_llama, NHASettings(window=0, sinks=0, slots=8)), TOKENS, 50)
    assert all(layer["mean"] == pytest.approx(1, abs=1e-6) for layer in layers)


def test_slot_mass_of_a_plain_model_is_empty(pico_llama: Path) -> None:
    assert slot_mass(AutoModelForCausalLM.from_pretrained(pico_llama), TOKENS, 50) == []


@torch.no_grad()
def test_slot_mass_is_that_of_the_recurrence(pico_llama: Path) -> None:
    """Layer 0 of a one-NHA-layer student, computed slot by slot from the definition (sinks off, one window)."""
    window, length = 6, 20
    model = load_student(pico_llama, NHASettings(window=[window, "full"], slots=8, sinks=0))
    layer = model.model.layers[0].self_attn
    layer.nha.slot_bias.copy_(torch.tensor([0.5, -0.5, 1.0, 0.0]))
    layer.nha.slot_q_scale.uniform_(0.5, 1.5)
    ids = TOKENS[:length][None]
    hidden = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))[0]
    query, key = (
        projection(hidden).view(length, -1, layer.head_dim).double() for projection in (layer.q_proj, layer.k_proj)
    )
    decay = layer.nha(hidden[None])[0][0].exp().double()  # [T,G,M]
    cos, sin = (part[0].double() for part in model.model.rotary_emb(hidden[None], torch.arange(length)[None]))

    def rotate(x: torch.Tensor, position: int) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        return x * cos[position] + torch.cat((-second, first), -1) * sin[position]

    shares = torch.zeros(length, 4)
    for head in range(4):
        group = head // 2
        slots = torch.zeros(8, layer.head_dim, dtype=torch.float64)
        for t in range(length):
            if t >= window:
                a = decay[t - window, group][:, None]
                slots = a * slots + (1 - a) * key[t - window, group]
            scaled = query[t, head] * layer.nha.slot_q_scale[head].double()
            memory = (slots @ scaled * layer.scaling + layer.nha.slot_bias[head].double()).exp().sum()
            memory = memory if t >= window else torch.tensor(0.0)
            near = range(max(0, t - window + 1), t + 1)
            exact = sum((rotate(query[t, head], t) @ rotate(key[j, group], j) * layer.scaling).exp() for j in near)
            shares[t, head] = memory / (memory + exact)
    (measured,) = slot_mass(model, TOKENS[:length], length, [(0, 6), (6, 12), (12, 20)])
    assert measured["layer"] == 0 and measured["buckets"]["0-6"] == 0
    assert measured["buckets"]["6-12"] == pytest.approx(shares[6:12].mean().item(), rel=1e-4)
    assert measured["buckets"]["12-20"] == pytest.approx(shares[12:].mean().item(), rel=1e-4)
    assert measured["mean"] == pytest.approx(shares.mean().item(), rel=1e-4)
    assert 0.05 < measured["mean"] < 0.95
