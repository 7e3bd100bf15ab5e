"""Slots that take rotated keys: where each holds one token, they are the teacher's attention to these tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch
from nha_kernels.gates import LOG_DECAY_FLOOR
from transformers import AutoModelForCausalLM

from nha_convert.convert import load_student
from nha_convert.modeling.attention_nha import teacher_mode
from nha_convert.plan import model_dimensions
from nha_convert.settings import NHASettings

WINDOW, SLOTS = 5, 12
IDS = torch.arange(WINDOW + SLOTS)[None] * 7 % 251


def student(folder: Path, **changes: Any) -> Any:
    settings = {"window": WINDOW, "slots": SLOTS, "sinks": 0, "slot_rotary": True} | changes
    return load_student(folder, NHASettings(**settings))


@torch.no_grad()
@pytest.mark.parametrize("rotary", [True, False])
def test_one_token_in_each_slot_is_full_attention(pico: Path, rotary: bool) -> None:
    """Token j goes to slot j alone; the last query then sees every token, in a slot or in the window."""
    layer = student(pico, slot_rotary=rotary).model.layers[0].self_attn
    hidden = torch.randn(1, IDS.shape[1], 64, generator=torch.Generator().manual_seed(0))
    decay = torch.zeros(1, IDS.shape[1], layer.nha.groups, SLOTS)
    for token in range(SLOTS):
        decay[:, token, :, token] = LOG_DECAY_FLOOR
    layer.nha.forward = lambda hidden_states: (decay, None, None)
    positions = student(pico).model.rotary_emb(hidden, torch.arange(IDS.shape[1])[None])
    found = layer(hidden, positions)[0][0, -1]
    with teacher_mode(layer):
        wanted = layer(hidden, positions)[0][0, -1]
    difference = float((found - wanted).abs().max() / wanted.abs().max())
    # the floor keeps 6e-5 of an empty slot, so a key is short by as much
    assert (difference < 2e-3) is rotary, difference


@torch.no_grad()
def test_a_wide_window_is_the_teacher(pico: Path) -> None:
    model, base = student(pico, window=64, sinks=2), AutoModelForCausalLM.from_pretrained(pico)
    wanted = base(IDS).logits
    assert (model(IDS).logits - wanted).abs().max() <= 1e-5  # fp32, as the family matrix
    model.set_windows("full")
    assert torch.equal(model(IDS).logits, wanted)


@torch.no_grad()
def test_positions_are_relative(pico_llama: Path) -> None:
    model = student(pico_llama)
    here, there = (model(IDS, position_ids=torch.arange(IDS.shape[1])[None] + start).logits for start in (0, 100))
    assert (here - there).abs().max() <= 1e-4  # fp32 angles of larger positions
    assert (here - student(pico_llama, slot_rotary=False)(IDS).logits).abs().max() > 1e-2, "the setting is read"


@torch.no_grad()
def test_packed_documents_are_separate(pico_llama: Path) -> None:
    model = student(pico_llama, window=3, slots=6, sinks=1)
    lengths = 11, 6
    ids = torch.arange(sum(lengths))[None] * 5 % 251
    packed = model(ids, position_ids=torch.cat([torch.arange(n) for n in lengths])[None], use_cache=False).logits[0]
    alone = torch.cat([model(part).logits[0] for part in ids.split(list(lengths), 1)])
    assert (packed - alone).abs().max() <= 1e-5


@torch.no_grad()
def test_the_cache_is_as_small_as_planned(pico_llama: Path) -> None:
    for rotary in (False, True):
        model = student(pico_llama, slot_rotary=rotary)
        cache = model(IDS, use_cache=True).past_key_values
        held = sum(x.numel() * x.element_size() for x in cache.layers[0].state.tensors().values())
        nha = NHASettings(window=WINDOW, slots=SLOTS, sinks=0, slot_rotary=rotary)
        assert held == model_dimensions(str(pico_llama)).nha_cache_bytes(nha, SLOTS, WINDOW, 4)
    assert cache.layers[0].state.rotary_dim == 0
