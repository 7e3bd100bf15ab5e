"""Slot weights against the op and the definition; what is made of them."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from nha_kernels.gates import write_strength
from nha_kernels.ops import nha_attention
from transformers import AutoModelForCausalLM

from nha_convert.convert import load_student
from nha_convert.evaluate.slots import LayerUsage, read_slots, slot_mass, slot_products, slot_usage, slot_weights
from nha_convert.settings import NHASettings

TOKENS = torch.arange(100) * 37 % 251


def masses(model: Any, tokens: torch.Tensor, length: int, buckets: Any = None, **options: Any) -> list[dict[str, Any]]:
    return slot_mass(read_slots(model, tokens, length, **options), length, buckets)


def student(folder: Path, **settings: Any) -> Any:
    """A student whose slot scale and bias are not at their start."""
    model = load_student(folder, NHASettings(slots=8, **settings))
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for layer in model.model.layers:
            if layer.self_attn.nha.slot_bias is not None:
                layer.self_attn.nha.slot_bias.normal_(generator=generator)
                layer.self_attn.nha.slot_q_scale.uniform_(0.5, 1.5, generator=generator)
    return model


def test_slot_mass_without_absorption_is_zero(pico: Path) -> None:
    layers = masses(load_student(pico, NHASettings(window=50, slots=8)), TOKENS, 50, bos=256)
    assert [layer["layer"] for layer in layers] == [0, 1]
    assert all(layer["mean"] == 0 and set(layer["buckets"].values()) == {0.0} for layer in layers)


def test_slot_mass_of_a_pure_memory_is_one(pico_llama: Path) -> None:
    layers = masses(load_student(pico_llama, NHASettings(window=0, sinks=0, slots=8)), TOKENS, 50)
    assert all(layer["mean"] == pytest.approx(1, abs=1e-5) for layer in layers)


def test_nothing_is_said_of_a_plain_model(pico_llama: Path) -> None:
    usage = read_slots(AutoModelForCausalLM.from_pretrained(pico_llama), TOKENS, 50)
    assert usage == {} and slot_mass(usage, 50) == [] and slot_usage(usage) == {}


@torch.no_grad()
@pytest.mark.parametrize(("window", "sinks", "mask_empty"), [(6, 2, True), (0, 0, True), (16, 0, False), (40, 4, True)])
def test_weights_sum_to_what_the_op_gives_the_slots(pico: Path, window: int, sinks: int, mask_empty: bool) -> None:
    """The op's own share, from the denominators with and without the window, at every position and head."""
    model = student(pico, window=window, sinks=sinks, mask_empty=mask_empty)
    layer = model.model.layers[0].self_attn
    ids = TOKENS[:50][None].expand(2, -1).contiguous()
    ids[1] = ids[1].flip(0)
    hidden = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))
    positions = model.model.rotary_emb(hidden, torch.arange(50)[None])
    weights, log_decay = slot_weights(layer, hidden, positions)
    query, key, value = layer._nha_projections(hidden)
    decay, scale, bias = layer.nha(hidden)
    options: dict[str, Any] = {"window": window, "sinks": sinks, "scale": layer.scaling, "mask_empty": mask_empty}
    options |= {"cos": positions[0], "sin": positions[1], "slot_q_scale": scale, "slot_bias": bias}
    lse = [
        nha_attention(query, key, value, decay, branch=branch, return_lse=True, **options)[1]
        for branch in ("slots", "both")
    ]
    expected = torch.nan_to_num(torch.exp(lse[0] - lse[1]), nan=0.0)
    torch.testing.assert_close(weights.sum(-1), expected, rtol=1e-4, atol=1e-5)
    assert weights.shape == (2, 50, 4, 8) and torch.equal(log_decay, decay)


def test_products_are_those_of_the_recurrence() -> None:
    """Slot by slot, the keys as the definition folds them, with gates from wide open to the floor."""
    generator = torch.Generator().manual_seed(0)
    window, sinks, time = 5, 2, 41
    query, key = torch.randn(1, time, 4, 16, generator=generator), torch.randn(1, time, 2, 16, generator=generator)
    log_decay = -torch.rand(1, time, 2, 8, generator=generator) * torch.tensor([1e-3, 0.01, 0.1, 0.5, 1, 3, 6, 9.7])
    found = slot_products(query, key, log_decay, window, sinks)
    for group in range(2):
        slots = torch.zeros(8, 16, dtype=torch.float64)
        for t in range(time):
            if t - window >= sinks:
                old = log_decay[0, t - window, group].double()
                slots = old.exp()[:, None] * slots + write_strength(old)[:, None] * key[0, t - window, group].double()
            expected = query[0, t, 2 * group : 2 * group + 2].double() @ slots.T
            torch.testing.assert_close(found[0, t, 2 * group : 2 * group + 2].double(), expected, rtol=1e-4, atol=1e-5)


def test_usage_of_known_weights() -> None:
    """Head 0 reads one slot, head 1 four alike, head 2 never any, head 3 two in turn."""
    weights = torch.zeros(1, 6, 4, 4)
    weights[..., 0, 2] = 0.5
    weights[..., 1, :] = 0.1
    weights[:, ::2, 3, 0], weights[:, 1::2, 3, 1] = 0.3, 0.3
    decay = torch.tensor([[0.5, 0.9, 0.99, 0.999], [0.25, 0.25, 0.25, 0.25]]).log().expand(1, 6, 2, 4)
    usage = LayerUsage(6)
    usage.add(weights[:, :, :, :], decay)
    found = slot_usage({3: usage, 5: usage})
    assert found["layers"] == [3, 5] and found["tokens"] == 6
    assert found["slot_mass"][0] == pytest.approx([0.5, 0.4, 0, 0.3], rel=1e-5)
    assert found["effective_slots"][0] == pytest.approx([1, 4, 0, 2], rel=1e-5)
    assert found["write_rate"][1] == pytest.approx([(0.5 + 0.1 + 0.01 + 0.001) / 4, 0.75], rel=1e-4)
    assert found["horizon_median"][0] == pytest.approx([55, 4 / 3], rel=1e-3)  # slots of 2, 10, 100 and 1000 tokens
    assert found["horizon_low"][0][0] == pytest.approx(2 + 0.3 * 8, rel=1e-3)
    assert found["horizon_high"][0][0] == pytest.approx(100 + 0.7 * 900, rel=1e-2)
    (mass, _) = slot_mass({3: usage, 5: usage}, 6)
    assert mass == {"layer": 3, "mean": pytest.approx(0.3), "buckets": {"0-6": pytest.approx(0.3)}}


@torch.no_grad()
def test_usage_of_gates_at_their_start(pico_llama: Path) -> None:
    """`zero` gates: every slot keeps 2^(-1/tau) of itself, whatever the text; half the layers are full."""
    model = load_student(pico_llama, NHASettings(window=[6, "full"], slots=8, gate_init="zero", tau=2.0))
    found = slot_usage(read_slots(model, TOKENS, 50, bos=256))
    assert found["layers"] == [0] and found["tokens"] == 103  # 100 and a BOS for each of the three windows
    rate = 1 - math.sqrt(0.5)
    assert found["write_rate"] == [[pytest.approx(rate, rel=1e-5)] * 2]
    for name in ("horizon_low", "horizon_median", "horizon_high"):
        assert found[name] == [[pytest.approx(1 / rate, rel=1e-5)] * 2]
    assert found["effective_slots"] == [[pytest.approx(8, rel=1e-4)] * 4]  # equal slots are read alike
    assert all(0 < share < 1 for share in found["slot_mass"][0])


@torch.no_grad()
@pytest.mark.parametrize("rotary", [False, True])
def test_slot_mass_is_that_of_the_recurrence(pico_llama: Path, rotary: bool) -> None:
    """Layer 0 of a one-NHA-layer student, computed slot by slot from the definition (sinks off, one window)."""
    window, length = 6, 20
    model = load_student(pico_llama, NHASettings(window=[window, "full"], slots=8, sinks=0, slot_rotary=rotary))
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
                left = key[t - window, group]
                slots = a * slots + (1 - a) * (rotate(left, t - window) if rotary else left)
            asking = rotate(query[t, head], t) if rotary else query[t, head]
            scaled = asking * layer.nha.slot_q_scale[head].double()
            memory = (slots @ scaled * layer.scaling + layer.nha.slot_bias[head].double()).exp().sum()
            memory = memory if t >= window else torch.tensor(0.0)
            near = range(max(0, t - window + 1), t + 1)
            exact = sum((rotate(query[t, head], t) @ rotate(key[j, group], j) * layer.scaling).exp() for j in near)
            shares[t, head] = memory / (memory + exact)
    (measured,) = masses(model, TOKENS[:length], length, [(0, 6), (6, 12), (12, 20)])
    assert measured["layer"] == 0 and measured["buckets"]["0-6"] == 0
    assert measured["buckets"]["6-12"] == pytest.approx(shares[6:12].mean().item(), rel=1e-4)
    assert measured["buckets"]["12-20"] == pytest.approx(shares[12:].mean().item(), rel=1e-4)
    assert measured["mean"] == pytest.approx(shares.mean().item(), rel=1e-4)
    assert 0.05 < measured["mean"] < 0.95
