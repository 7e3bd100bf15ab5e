"""A model with one layer that needs distant tokens, made by hand, and text to measure on."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from needy import LAYERS, NEEDY
from transformers import AutoModelForCausalLM, LlamaConfig


@pytest.fixture(scope="session")
def needy_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """Four layers; in one the queries are zero, so it averages all tokens before; the others attend to themselves."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.15,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            attention = layer.self_attn
            if index == NEEDY:
                attention.q_proj.weight.zero_()
                continue
            keys = attention.k_proj.weight.view(2, 16, 64).repeat_interleave(2, 0)  # [H,D,hidden]
            attention.q_proj.weight.copy_(20 * keys.reshape(64, 64))
    folder = tmp_path_factory.mktemp("needy")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12,000 characters of words in random order."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("words") / "words.txt"
    path.write_text(" ".join("".join(rng.choices("abcdefghij", k=rng.randint(2, 7))) for _ in range(2400))[:12000])
    return path
