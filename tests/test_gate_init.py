"""Starting gates: where their rows come from, which horizons they keep."""

from pathlib import Path

import pytest
import torch
from nha_kernels.gates import log_decay_from_logits

from nha_convert.convert import load_student
from nha_convert.gate_init import gate_parameters, horizon_biases, init_gates, layer_horizons
from nha_convert.modeling.attention_nha import nha_layers
from nha_convert.settings import NHASettings

KEY = torch.randn(2 * 8, 12, generator=torch.Generator().manual_seed(0))


def gates(method: str, slots: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return gate_parameters(KEY, method, groups=2, slots=slots, tau=8.0, seed=seed)


def test_key_takes_the_rows_of_w_k() -> None:
    weight, bias = gates("key", 8)
    assert torch.equal(weight, KEY) and not bias.any()
    weight, _ = gates("key", 4)
    assert torch.equal(weight, KEY[[0, 2, 4, 6, 8, 10, 12, 14]])


def test_more_slots_than_channels_are_all_different() -> None:
    weight, _ = gates("key", 20)
    heads = weight.view(2, 20, 12)
    assert torch.equal(heads[:, :8], KEY.view(2, 8, 12))
    assert (heads[:, 8:16] - heads[:, :8]).abs().max() < 0.6 and torch.cdist(heads, heads).add(
        torch.eye(20)
    ).min() > 1e-2
    assert torch.equal(weight, gates("key", 20)[0]) and not torch.equal(weight, gates("key", 20, seed=1)[0])


@pytest.mark.parametrize("tau", [1.0, 8.0])
def test_spread_horizons(tau: float) -> None:
    decay = log_decay_from_logits(horizon_biases(16, tau), tau).double().exp()
    horizons = 1 / (1 - decay)
    assert torch.allclose(horizons[[0, -1]], torch.tensor([8.0, 2000.0]).double(), rtol=2e-3)
    steps = horizons.log().diff()
    assert torch.allclose(steps, steps.mean().expand_as(steps), rtol=2e-2)
    assert horizon_biases(1, tau).shape == (1,)
    weight, bias = gate_parameters(KEY, "spread", groups=2, slots=8, tau=tau, seed=0)
    assert torch.allclose(weight, 0.3 * KEY) and torch.equal(bias[:8], bias[8:])


def test_horizons_have_ends_of_their_own() -> None:
    weight, bias = gate_parameters(KEY, "horizons", groups=2, slots=8, tau=8.0, seed=0, horizons=(32.0, 1024.0))
    decay = log_decay_from_logits(bias[:8], 8.0).double().exp()
    assert torch.allclose(1 / (1 - decay)[[0, -1]], torch.tensor([32.0, 1024.0]).double(), rtol=2e-3)
    assert torch.allclose(weight, 0.3 * KEY)
    assert layer_horizons(64, None, 1024) == (64, 1024) and layer_horizons(64, [16, 99], 1024) == (16, 99)
    assert layer_horizons(64, None, None) == (64, 2000) and layer_horizons(None, None, 512) == (8, 512)
    assert layer_horizons(0, None, 512) == (2, 512) and layer_horizons(512, None, 512) == (512, 1024)


def test_settings_of_horizons() -> None:
    assert NHASettings(gate_init="horizons", gate_horizons=[8, 100]).gate_horizons == [8, 100]
    with pytest.raises(ValueError, match="read by gate_init horizons, clusters and calibrated, found spread"):
        NHASettings(gate_horizons=[8, 100])
    for wrong in ([100, 8], [8], [1, 100], [8, 100, 200]):
        with pytest.raises(ValueError, match="gate_horizons"):
            NHASettings(gate_init="horizons", gate_horizons=wrong)


def test_zero_and_refusals() -> None:
    weight, bias = gates("zero", 8)
    assert not weight.any() and not bias.any() and weight.shape == (16, 12)
    with pytest.raises(ValueError, match="key, spread, zero"):
        gates("keys", 8)
    with pytest.raises(ValueError, match="16 rows"):
        gate_parameters(KEY, "key", groups=3, slots=8, tau=8.0, seed=0)


def test_init_gates_resets_everything(pico_llama: Path) -> None:
    model = load_student(pico_llama, NHASettings(window=4, slots=40, gate_init="zero"))
    layers = [layer for _, layer in nha_layers(model)]
    with torch.no_grad():
        layers[0].nha.slot_bias.add_(1)
        layers[0].nha.slot_q_scale.add_(1)
    init_gates(model, "key", seed=3)
    assert torch.equal(layers[0].nha.slot_bias, torch.zeros(4)) and torch.equal(
        layers[0].nha.slot_q_scale, torch.ones(4, 16)
    )
    noise = [
        layer.nha.gate_proj.weight.view(2, 40, 64)[:, 16:32] - layer.k_proj.weight.view(2, 16, 64) for layer in layers
    ]
    assert noise[0].abs().max() > 0 and not torch.equal(*noise)
