"""What training stages take: a step of each is run on PyTorch's fake mode, its live bytes and parameters counted.

No weights are read and nothing is allocated. A model of a few layers stands for the whole: all is linear in the number
of layers of each kind.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from nha_kernels.backends import as_on_gpu
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, masking_utils

from .convert import nha_config
from .memory_tracker import counting
from .model_files import read_config
from .modeling.attention_nha import nha_layers
from .recipe import Recipe
from .settings import NHASettings
from .train.objectives import make_objective
from .train.wrapping import prepared

PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "allocator")
ALLOCATOR = 0.25
"""What allocators hold beyond live tensors, as a share of them: 0.17 to 0.36 on a CPU, in six stages of three recipes
(`python tools/acceptance.py plan`)."""
COUNTS = ("trained_parameters", "trained_base_parameters")
FEW = 2
"""NHA layers of the smallest model that is run."""


def stage_cost(recipe: Recipe, index: int) -> dict[str, int]:
    """Parameters that a stage trains, and bytes at the peak of one optimizer step of one process that holds all of it.

    Args:
        recipe: its model's config.json is read.
        index: of the stage.
    Returns:
        `COUNTS` and `PARTS` by name. The parts add up to the peak; gradients are those of all that is trained, where
        there is room for them in the peak, and what else is alive are activations.
    """
    config = model_config(recipe.model)
    windows = recipe.nha.windows(config.num_hidden_layers)
    exact = [window for window in windows if window is not None]
    full = len(windows) - len(exact)
    if not exact:
        return dict.fromkeys((*COUNTS, *PARTS), 0)
    if recipe.by_layer(index):
        return _with_allocator(_own_gates(_by_layer(recipe, index, config, max(exact), len(exact)), recipe, config))
    few = _measure(recipe, index, config, [max(exact)] * FEW)
    more = _measure(recipe, index, config, [max(exact)] * (FEW + 1))
    parts = {name: few[name] + (more[name] - few[name]) * (len(exact) - FEW) for name in few}
    if full:
        beside = _measure(recipe, index, config, [max(exact)] * FEW + ["full"])
        parts = {name: parts[name] + beside[name] - few[name] for name in few}
        if full > 1:  # the first brings what all of them share: the mask between documents
            again = _measure(recipe, index, config, [max(exact)] * FEW + ["full"] * 2)
            parts = {name: parts[name] + (again[name] - beside[name]) * (full - 1) for name in few}
    if "gates" in recipe.stages[index].train:
        parts = _own_gates(parts, recipe, config)
    return _with_allocator(parts)


def _nha_slots(recipe: Recipe, config: PretrainedConfig) -> list[int]:
    """The slots of each NHA layer."""
    layers = config.num_hidden_layers
    every = zip(recipe.nha.slots_by_layer(layers), recipe.nha.windows(layers))
    return [slots for slots, window in every if window is not None]


def _own_gates(parts: dict[str, int], recipe: Recipe, config: PretrainedConfig) -> dict[str, int]:
    """What is trained, where every layer was counted with the most slots that one of them has."""
    slots = _nha_slots(recipe, config)
    elsewhere = sum(max(slots) - own for own in slots) * (config.hidden_size + 1) * config.num_key_value_heads
    return parts | {"trained_parameters": parts["trained_parameters"] - elsewhere}


def _with_allocator(parts: dict[str, int]) -> dict[str, int]:
    parts = {name: max(0, value) for name, value in parts.items()}
    live = sum(value for name, value in parts.items() if name not in COUNTS)
    return parts | {"allocator": round(ALLOCATOR * live)}


def _by_layer(recipe: Recipe, index: int, config: PretrainedConfig, window: int, layers: int) -> dict[str, int]:
    """`stage_cost` with a few layers in memory: theirs without embedding and head, and the gates of all others with
    their optimizer state.
    """
    held = min(recipe.runtime.layers_at_once or layers, layers)
    bare = _with_layers(config, config.num_hidden_layers)
    bare.vocab_size = 1
    bare.pad_token_id = bare.bos_token_id = bare.eos_token_id = None
    few = _measure(recipe, index, bare, [window] * held)
    each = few["trained_parameters"] // held
    others = each * (layers - held)
    few["trained_parameters"] = each * layers
    few["weights"] += 4 * others
    few["optimizer"] += 8 * others
    return few


def model_config(model: str) -> PretrainedConfig:
    """A model's configuration, from config.json alone."""
    fields = read_config(model)
    return AutoConfig.for_model(**fields)


def _measure(recipe: Recipe, index: int, config: PretrainedConfig, windows: list[int | str]) -> dict[str, int]:
    """`stage_cost` of a model with as many layers as `windows` has entries."""
    stage = recipe.stages[index].model_copy(update={"windows": None})
    most = max(_nha_slots(recipe, config))
    nha = recipe.nha.model_copy(update={"window": windows, "full_attention_layers": [], "slots": most})
    small = nha_config(_with_layers(config, len(windows)), NHASettings(**nha.model_dump()))
    dtype = getattr(torch, recipe.runtime.dtype)
    joined = bool(getattr(config, "num_experts", 0)) and dtype == torch.float32
    if joined:  # products of experts have no fake form in fp32: half as wide, and counted twice
        dtype = torch.bfloat16
    on_cpu = recipe.runtime.device in ("cpu", "mps")
    with counting(config.vocab_size if config.vocab_size > 1 else 0) as live, nullcontext() if on_cpu else as_on_gpu():
        model = AutoModelForCausalLM.from_config(small, dtype=dtype)
        teacher = AutoModelForCausalLM.from_config(small, dtype=dtype) if recipe.needs_teacher(index) else None
        with mock.patch.object(nn.Module, "_apply", _left_alone):
            objective = make_objective(model, stage, seed=0, teacher=teacher)
        groups = objective.groups()
        weights = live.now
        optimizer = torch.optim.AdamW([{key: group[key] for key in ("params", "lr")} for group in groups])
        rows = min(stage.batch_size, recipe.runtime.micro_batch or stage.batch_size)
        ids = torch.zeros(rows, stage.sequence_length, dtype=torch.long)
        batch = {"input_ids": ids, "labels": ids}
        trained = [tensor for group in groups for tensor in group["params"]]
        for tensor in trained:  # a step of nothing: from then on the optimizer has its state
            tensor.grad = torch.zeros_like(tensor)
        optimizer.step()
        optimizer.zero_grad()
        live.restart()
        runtime = recipe.runtime.model_copy(update={"compile": False})
        with prepared(model, runtime), nullcontext() if recipe.data.packing == "documents" else _unpacked():
            for _ in range(1 if rows == stage.batch_size else 2):  # the second has the first one's gradients beside it
                loss, _measured = objective(batch, objective.count(batch))
                loss.backward()
                del loss, _measured
            optimizer.step()
            optimizer.zero_grad()
        held = sum(
            value.numel() * value.element_size()
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        )
        gradients = sum(tensor.numel() * tensor.element_size() for tensor in trained)
        rest = live.peak - weights - held
        gradients = min(gradients, rest - live.logits_at_peak)
        own = {id(tensor) for _, layer in nha_layers(model) for tensor in layer.nha.parameters()}
        base = [tensor for name, tensor in model.named_parameters() if id(tensor) not in own and "lora_" not in name]
        wide = 2 if joined else 1
        return {
            "trained_parameters": sum(tensor.numel() for tensor in trained),
            "trained_base_parameters": sum(tensor.numel() for tensor in base if tensor.requires_grad),
            "weights": wide * weights,
            "gradients": gradients,
            "optimizer": held,
            "activations": wide * (rest - gradients - live.logits_at_peak),
            "logits": live.logits_at_peak,
        }


def _unpacked() -> Any:
    """Inside, rows are one document each, which fake tensors cannot say: no T x T mask is made for full layers."""
    return mock.patch.object(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)


def _left_alone(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """For peft's `.to(...)` of adapters to where they are already, which fails on fake tensors."""
    return module


def _with_layers(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The configuration of a model that has fewer layers; the first kinds of layer are kept."""
    fields: dict[str, Any] = config.to_dict()
    fields["num_hidden_layers"] = layers
    if fields.get("layer_types"):
        fields["layer_types"] = (fields["layer_types"] * layers)[:layers]
    return type(config)(**{key: value for key, value in fields.items() if key != "model_type"})
