"""Whether the sizes in a config.json can be those of a model, before anything is built from them. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

LIMITS = {
    "num_hidden_layers": 10_000,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 24,
    "moe_intermediate_size": 1 << 24,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 16,
    "vocab_size": 1 << 27,
    "max_position_embeddings": 1 << 40,
    "num_experts": 1 << 16,
    "num_experts_per_tok": 1 << 16,
}
"""The largest value of each size that is taken for a model's."""
_OPTIONAL = {"num_key_value_heads", "head_dim", "max_position_embeddings"}  # null means: derived from the others
_LAYER = re.compile(r"(?:model\.)?layers\.(\d{1,9})\.")


def size_problems(where: str, config: dict[str, Any]) -> list[str]:
    """One line for each size in a config that is no whole number from 1 to its limit."""
    problems = []
    for key, limit in LIMITS.items():
        value = config.get(key, 1)
        if value is None and key in _OPTIONAL:
            continue
        if type(value) is not int or not 1 <= value <= limit:
            found = repr(value) if type(value) is not int or abs(value) < 10**20 else "an integer of many digits"
            found = found if len(found) < 60 else found[:60] + "..."
            problems.append(
                f"{where}: {key} is {found}; a whole number from 1 to {limit} is needed; fetch config.json again"
            )
    return problems


def layers_problem(config: dict[str, Any], tensors: Iterable[str]) -> str | None:
    """Whether the weights have as many layers as config.json says."""
    found = {int(match[1]) for name in tensors if (match := _LAYER.match(name))}
    wanted = config.get("num_hidden_layers")
    if not found or wanted is None or max(found) + 1 == wanted:
        return None
    return f"the weights have {max(found) + 1} layers, but config.json makes num_hidden_layers {wanted}"


def shape_problem(config: dict[str, Any], name: str, shape: tuple[int, ...]) -> str | None:
    """Whether the embedding, which the largest sizes show in, has the shape that config.json gives it."""
    wanted = (config.get("vocab_size"), config.get("hidden_size"))
    if not name.endswith("model.embed_tokens.weight") or None in wanted or shape == wanted:
        return None
    return f"{name} has shape {list(shape)}, but config.json makes it {list(wanted)}"
