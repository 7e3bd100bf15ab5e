"""What a stage trains: gates, adapters, or tensors of the base model; and what becomes of it when the stage is over."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..errors import InputError
from ..modeling.attention_nha import nha_layers
from ..stage_settings import StageSettings


@dataclass
class Selection:
    """The trained part of a model.

    Attributes:
        groups: optimizer groups: `name` (`lr`, `gate_lr`), `params`, `lr`, `weight_decay`.
        names: the tensors that the stage changes, under the plain model's names.
        adapted: the model under peft, which changed it in place; None without adapters.
    """

    groups: list[dict[str, Any]]
    names: list[str]
    adapted: PeftModel | None

    def without_adapters(self) -> AbstractContextManager[Any]:
        """Inside, the model computes without its adapters."""
        return nullcontext() if self.adapted is None else self.adapted.disable_adapter()

    @contextmanager
    def with_adapters(self, module: nn.Module) -> Iterator[None]:
        """Inside, within `without_adapters`, the adapters of one module are active all the same."""
        layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
        for layer in layers:
            layer.enable_adapters(True)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(False)

    def merge(self, model: Any) -> dict[str, torch.Tensor]:
        """Adds adapters to the weights, leaving the plain model; the changed tensors by name, detached."""
        if self.adapted is not None:
            model.eval()
            model = self.adapted.merge_and_unload()
        parameters = dict(model.named_parameters())
        return {name: parameters[name].detach() for name in self.names}


def select(model: Any, settings: StageSettings, seed: int) -> Selection:
    """Marks what a stage trains with `requires_grad`, everything else without, and adds adapters.

    Args:
        model: an NHA language model without adapters; adapters are put into it in place.
        settings: `train`, `lora`, learning rates and weight decay are read.
        seed: of the adapters' first weights.
    Raises:
        InputError: gates are to be trained and no layer runs NHA.
    """
    layers = [(index, layer) for index, layer in nha_layers(model) if layer.nha_window is not None]
    if not layers and (settings.train == ["gates"] or settings.kind == "align"):
        raise InputError(
            f"{settings.label}: nothing to train, every layer runs full attention in this "
            "stage; set nha.window, or the stage's windows, to a number"
        )
    new = {id(tensor) for _, layer in nha_layers(model) for tensor in layer.nha.parameters()}
    gates = [tensor for _, layer in layers for tensor in layer.nha.parameters()] if "gates" in settings.train else []
    learned = {id(tensor) for tensor in gates}
    only = {index for index, _ in layers} if settings.kind == "align" else None
    names = [
        name
        for name, tensor in model.named_parameters()
        if (id(tensor) in learned if id(tensor) in new else _changes(name, settings, only))
    ]
    base = [(name, tensor) for name, tensor in model.named_parameters() if name in set(names) and id(tensor) not in new]
    model.requires_grad_(False)
    adapted = None
    if "lora" in settings.train:
        adapted = _with_lora(model, settings, seed, only)
        base = [(name, tensor) for name, tensor in model.named_parameters() if tensor.requires_grad]
    for tensor in [*gates, *(tensor for _, tensor in base)]:
        tensor.requires_grad_(True)
    return Selection(_groups(base, gates, settings), sorted(names), adapted)


def _layer_of(name: str) -> int | None:
    """The decoder layer that a tensor's name stands in."""
    _, found, rest = name.partition("layers.")
    return int(rest.split(".", 1)[0]) if found else None


def _changes(name: str, settings: StageSettings, only: set[int] | None) -> bool:
    """Whether a stage changes a base tensor; `only` are the layers that it reaches."""
    return (only is None or _layer_of(name) in only) and settings.may_change(name)


def _with_lora(model: Any, settings: StageSettings, seed: int, only: set[int] | None) -> PeftModel:
    torch.manual_seed(seed)  # of the adapters' first weights
    config = LoraConfig(
        r=settings.lora.rank,
        lora_alpha=settings.lora.alpha,
        lora_dropout=settings.lora.dropout,
        target_modules=list(settings.lora.targets),
        layers_to_transform=None if only is None else sorted(only),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name that is going
        return get_peft_model(model, config)


def _groups(
    base: list[tuple[str, nn.Parameter]], gates: list[nn.Parameter], settings: StageSettings
) -> list[dict[str, Any]]:
    """Optimizer groups; gates, biases and norms are never decayed."""
    rate, decay = settings.learning_rate, settings.weight_decay
    gate_rate = rate if settings.gate_learning_rate is None else settings.gate_learning_rate
    plain = [tensor for _, tensor in base if tensor.ndim < 2] if decay else []
    kept = {id(tensor) for tensor in plain}
    decayed = [tensor for _, tensor in base if id(tensor) not in kept]
    groups: list[dict[str, Any]] = [
        {"name": "lr", "params": decayed, "lr": rate, "weight_decay": decay},
        {"name": "plain_lr", "params": plain, "lr": rate, "weight_decay": 0.0},
        {"name": "gate_lr" if base else "lr", "params": gates, "lr": gate_rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
