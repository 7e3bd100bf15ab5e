"""The teachers' architectures and sizes."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from nha_convert.errors import InputError

CONTEXT = 1280
"""Positions of every teacher, and tokens of the last training stage."""
CLASSES: dict[str, tuple[type, type]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


@dataclass(frozen=True)
class TeacherSize:
    """The dimensions of a teacher.

    Attributes:
        layers: decoder blocks.
        hidden: width of the residual stream.
        intermediate: width inside the feed-forward blocks.
        heads: query heads.
        kv_heads: key and value heads; divides `heads`.
        head_dim: width of one head, an even number.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int

    def check(self) -> None:
        """Raises InputError for dimensions that no model can have."""
        for field in fields(self):
            value, option = getattr(self, field.name), "--" + field.name.replace("_", "-")
            if value < 1:
                raise InputError(f"{option} is {value}; give a whole number of at least 1")
        if self.heads % self.kv_heads:
            raise InputError(f"--kv-heads is {self.kv_heads}; give a divisor of the {self.heads} query heads (--heads)")
        if self.head_dim % 2:
            raise InputError(f"--head-dim is {self.head_dim}; give an even number, as rotary positions turn pairs")


SIZES = {
    "llama": TeacherSize(layers=4, hidden=256, intermediate=512, heads=4, kv_heads=2, head_dim=64),
    "qwen3": TeacherSize(layers=6, hidden=192, intermediate=512, heads=6, kv_heads=2, head_dim=32),
}
"""Sizes taken unless told otherwise: `llama` is the embedded teacher (3.4 M parameters), `qwen3` has 3.1 M."""


def new_teacher(architecture: str, size: TeacherSize, vocab_size: int, seed: int) -> Any:
    """A model with random weights in fp32, all drawn from `seed`.

    Embeddings are untied and the initialisation is wide (0.06), without which recall was lost.

    Args:
        architecture: a key of `CLASSES`.
        size: its dimensions.
        vocab_size: tokens of the vocabulary; `<s>`, `</s>` and `<pad>` are its first three.
        seed: sets torch's generator.
    Returns:
        A causal language model of `transformers`, for `CONTEXT` positions.
    """
    config_class, model_class = CLASSES[architecture]
    config = config_class(
        vocab_size=vocab_size,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
        initializer_range=0.06,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    torch.manual_seed(seed)
    return model_class(config)
