"""Whether the tensors on disk are those of a model, by name, shape and kind, before any is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers.core_model_loading import revert_weight_conversion

from ..convert import check_missing, new_parameter_names
from ..files import shown
from .weight_files import refuse

FLOATS = ("F64", "F32", "F16", "BF16")


class Described(Protocol):
    """What is known of a stored tensor before it is read."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def path(self) -> Path: ...


def expected_shapes(skeleton: Any) -> dict[str, tuple[int, ...]]:
    """The tensors of a model as `save_pretrained` stores them: one per expert, say, where memory holds them fused.

    Args:
        skeleton: the model on the meta device.
    """
    state: dict[str, torch.Tensor] = revert_weight_conversion(skeleton, skeleton.state_dict())
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def check_tensors(folder: Path, tensors: Mapping[str, Described], skeleton: nn.Module) -> None:
    """Compare names, shapes and dtypes on disk with a student's.

    Raises:
        InputError: a tensor of the base model is missing, has another shape, or is no floating-point tensor; one line
            per problem.
    """
    expected = expected_shapes(skeleton)
    tied = set(getattr(skeleton, "all_tied_weights_keys", {}))
    check_missing(folder, set(expected) - tied - set(tensors), new_parameter_names(skeleton))
    problems = []
    for name in (name for name in tensors if name in expected):
        tensor, wanted = tensors[name], expected[name]
        if tensor.shape != wanted:
            problems.append(
                f"{tensor.path}: {shown(name)} has shape {list(tensor.shape)}, but config.json makes it "
                f"{list(wanted)}; weights and configuration are of different models"
            )
        elif tensor.dtype not in FLOATS:
            problems.append(
                f"{tensor.path}: {shown(name)} is {tensor.dtype}, one of {', '.join(FLOATS)} is needed; its weights "
                "are quantised: name the unquantised model"
            )
    refuse(problems)
