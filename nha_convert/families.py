"""The model families that can be converted: one entry each. Imports no torch; travels with checkpoints.

A new family is one entry here, a recipe with its entry in `recipe_choice.BY_SIZE`, and a pico model in
`tests/conftest.py`, over which every family test then runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """One base family.

    Attributes:
        model_type: of its config.json; also the name of its module in `transformers.models`.
        prefix: of its classes in `transformers`: `LlamaConfig`, `LlamaAttention`, `LlamaModel`, `LlamaForCausalLM`.
        models: what its users call it.
        qkv_bias: q, k and v have biases whatever the configuration says.
        qk_norm: queries and keys are normalised per head.
        mlp_bias: the configuration may give the feed-forward layers biases.
        sliding: which layers `sliding_window` makes sliding-window attention: "none", "all", or "upper" (those that
            `layer_types` or `max_window_layers` name).
        sliding_default: whether that happens where the configuration does not say `use_sliding_window`.
    """

    model_type: str
    prefix: str
    models: str
    qkv_bias: bool = False
    qk_norm: bool = False
    mlp_bias: bool = False
    sliding: str = "none"
    sliding_default: bool = False

    @property
    def nha_model_type(self) -> str:
        """`model_type` of a converted model's config.json."""
        return f"nha_{self.model_type}"

    def sliding_windows(self, config: Mapping[str, Any]) -> list[int | None]:
        """The sliding window of each layer's own attention; None where it sees everything.

        Args:
            config: content of config.json, as the base family's configuration class reads it.
        """
        layers = int(config["num_hidden_layers"])
        window = config.get("sliding_window", 4096)
        if self.sliding == "none" or not window or not config.get("use_sliding_window", self.sliding_default):
            return [None] * layers
        kinds = config.get("layer_types")
        if self.sliding == "all":
            sliding = [True] * layers
        elif kinds:
            sliding = [kind == "sliding_attention" for kind in kinds]
        else:
            sliding = [layer >= config.get("max_window_layers", 28) for layer in range(layers)]
        return [int(window) if there else None for there in sliding]


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "Llama", "Llama 2, 3, 3.1, 3.2", mlp_bias=True),
        Family("mistral", "Mistral", "Mistral", sliding="all", sliding_default=True),
        Family("qwen2", "Qwen2", "Qwen2, Qwen2.5", qkv_bias=True, sliding="upper"),
        Family("qwen3", "Qwen3", "Qwen3", qk_norm=True, sliding="upper"),
        Family("qwen3_moe", "Qwen3Moe", "Qwen3-MoE", qk_norm=True, sliding="all"),
    )
}
"""Every supported family by `model_type`."""
