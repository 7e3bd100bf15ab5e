"""The new tensors of a swapped checkpoint: made from the stored W_k, one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..convert import new_parameter_names
from ..gate_init import Horizons, gate_parameters, layer_horizons, layer_seed
from ..modeling.attention_nha import nha_layers
from ..settings import NHASettings
from .base_shards import plan_shards
from .pickled_weights import raw_bytes
from .shard_files import create_shard, write_tensor
from .weight_files import StoredTensor

PATTERN = "model-nha{suffix}.safetensors"


@dataclass(frozen=True)
class _Planned:
    dtype: str
    shape: tuple[int, ...]


def write_gates(
    work: Path, base: Mapping[str, StoredTensor], skeleton: Any, nha: NHASettings, seed: int, max_shard_size: str
) -> dict[str, StoredTensor]:
    """Write what the base model lacks to `model-nha*.safetensors`, in fp32.

    Args:
        base: the base tensors, by name.
        skeleton: the student on the meta device.
        seed: of the gates.
    Returns:
        The new tensors by name.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}
    wanted = {name: _Planned("F32", shapes[name]) for name in sorted(new_parameter_names(skeleton))}
    places: dict[str, StoredTensor] = {}
    for file, names in plan_shards(wanted, PATTERN, max_shard_size).items():
        places |= create_shard(work / file, {name: (wanted[name].dtype, wanted[name].shape) for name in names})
    modules = {id(module): name for name, module in skeleton.named_modules()}
    for index, attention in nha_layers(skeleton):
        prefix = modules[id(attention)]
        key = f"{prefix}.k_proj.weight"
        with safe_open(base[key].path, "pt") as file:
            tensors = layer_gates(
                attention.nha,
                file.get_tensor(key),
                nha.gate_init,
                layer_seed(seed, index),
                layer_horizons(attention.nha_window, nha.gate_horizons, None),
            )
        for name, tensor in tensors.items():
            write_tensor(places[f"{prefix}.nha.{name}"], raw_bytes(tensor))
    return places


def layer_gates(
    gate: Any, key_weight: torch.Tensor, method: str, seed: int, horizons: Horizons
) -> dict[str, torch.Tensor]:
    """One layer's new tensors, by their names under `nha`; never of routed gates, which need text."""
    assert gate.write_proj is None, "refuse_text comes first"
    weight, bias = gate_parameters(
        key_weight, method, groups=gate.groups, slots=gate.slots, tau=gate.tau, seed=seed, horizons=horizons
    )
    tensors = {"gate_proj.weight": weight, "gate_proj.bias": bias}
    if gate.slot_q_scale is not None:
        tensors["slot_q_scale"] = torch.ones(gate.slot_q_scale.shape)
    if gate.slot_bias is not None:
        tensors["slot_bias"] = torch.zeros(gate.slot_bias.shape)
    return tensors
