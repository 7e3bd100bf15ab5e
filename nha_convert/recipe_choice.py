"""Which shipped recipe a model takes: that of its family whose own model is nearest in size. Imports no torch.

Recipes that are not here (`demo`, `align-only`, `all-layers`, `paper-llama-3-8b`, `long-context`) are taken by name
alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .errors import InputError


@dataclass(frozen=True)
class Sized:
    """A recipe that models can take.

    Attributes:
        name: of the recipe.
        family: `model_type` of its model and of those that can take it.
        parameters: of its model.
    """

    name: str
    family: str
    parameters: int


BY_SIZE = (
    Sized("llama-3.2-1b", "llama", 1_235_814_400),
    Sized("llama-3.1-8b", "llama", 8_030_261_248),
    Sized("mistral", "mistral", 7_248_023_552),
    Sized("qwen2.5-0.5b", "qwen2", 494_032_768),
    Sized("qwen2.5-7b", "qwen2", 7_615_616_512),
    Sized("qwen3-0.6b", "qwen3", 596_049_920),
    Sized("qwen3-8b", "qwen3", 8_190_735_360),
    Sized("qwen3_moe", "qwen3_moe", 30_532_122_624),
)
"""The recipes that `run MODEL` chooses from."""


@dataclass(frozen=True)
class Choice:
    """The recipe of a model, and why.

    Attributes:
        recipe: its name.
        reason: one line for whoever asks.
    """

    recipe: str
    reason: str


def choose(model: str, family: str, parameters: int) -> Choice:
    """The recipe of the model's family whose model differs least in size, as a ratio; of two as near the smaller one.

    Args:
        model: named in the reason.
        family: its `model_type`.
        parameters: of the whole model.
    Raises:
        InputError: no recipe is for this family.
    """
    there = sorted((one for one in BY_SIZE if one.family == family), key=lambda one: one.parameters)
    if not there:
        raise InputError(
            f"{model}: no shipped recipe is for models of type {family}; copy one that is near with "
            "`nha-convert recipes cp NAME my.yaml`, set its model, and run my.yaml"
        )
    from .quantities import count

    nearest = min(there, key=lambda one: abs(math.log(max(1, parameters) / one.parameters)))
    names = ", ".join(one.name for one in there)
    why = f"nearest in size of {names}" if len(there) > 1 else "the only one of its family"
    return Choice(nearest.name, f"{model} ({family}, {count(parameters)} parameters) takes {nearest.name}: {why}")


def choose_for(model: str) -> Choice:
    """`choose` for a Hub id or a model folder, from its config.json.

    Raises:
        InputError: the model cannot be found, or is of a family that cannot be converted.
    """
    from .plan import model_dimensions

    sizes = model_dimensions(model)
    return choose(model, sizes.family, sizes.parameters)

