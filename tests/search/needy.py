"""What the tests of searches share: the sizes of the model made by hand, and a recipe."""

from __future__ import annotations

from pathlib import Path

import yaml

from nha_convert.recipe import Recipe, parse_recipe

LAYERS = 4
NEEDY = 2
"""The layer that needs distant tokens."""
LENGTH = 96


def small_recipe(model: Path | str, text: Path, *overrides: str) -> Recipe:
    """A recipe of one short stage on rows of 96 tokens."""
    settings = {
        "model": str(model),
        "output": "unused",
        "seed": 3,
        "nha": {"slots": 8, "window": 8, "sinks": 1, "full_attention_layers": "auto:1"},
        "data": {"sources": [{"source": "text", "path": str(text)}], "held_out_tokens": 256},
        "stages": [{"kind": "align", "tokens": 384, "sequence_length": 48, "batch_size": 2, "save_steps": 2}],
        "evaluate": {
            "benchmark_contexts": [64],
            "benchmark_prefill": [],
            **{"sequence_length": LENGTH, "tokens": 256, "recall_pairs": 2, "recall_prompts": 2},
            "recall_distances": [2],
        },
        "search": {"tokens": 384},
        "runtime": {"device": "cpu", "threads": 1, "logging_steps": 1},
    }
    return parse_recipe(yaml.safe_dump(settings), "small", overrides)
