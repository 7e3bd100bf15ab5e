"""Pico models and a byte tokenizer for every test: two layers, hidden 64, random weights that are not near zero."""

import atexit
import os
import shutil
import sys
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests never reach a network
if "HF_DATASETS_CACHE" not in os.environ:  # tokenised text of the tests, shared by their processes
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="nha-tests-")
    atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
os.environ.setdefault("NHA_TEST_LANE", "gpu" if "gpu" in sys.argv else "default")  # workers of xdist inherit it
if os.environ["NHA_TEST_LANE"] != "gpu":  # all but `-m gpu` runs Triton's kernels in its interpreter, on CPU tensors
    os.environ["TRITON_INTERPRET"] = "1"  # set before anything imports triton

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

PICO_VOCABULARY = 264

_SHARED: dict[str, Any] = {
    "vocab_size": PICO_VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
_ROPES: dict[str, dict[str, Any]] = {
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
}


def _rope(kind: str) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, **_ROPES[kind]}}


_TIED = {"tie_word_embeddings": True}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True}

PICO_MODELS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**_SHARED),
    "llama_tied_rope": lambda: LlamaConfig(**_SHARED, **_TIED, **_rope("llama3"), head_dim=32, attention_bias=True),
    "qwen2": lambda: Qwen2Config(**_SHARED),
    "qwen2_tied": lambda: Qwen2Config(**_SHARED, **_TIED),
    "qwen3": lambda: Qwen3Config(**_SHARED, head_dim=32),
    "qwen3_tied": lambda: Qwen3Config(**_SHARED, **_TIED, head_dim=16),
    "mistral": lambda: MistralConfig(**_SHARED, sliding_window=None),
    "qwen3_moe": lambda: Qwen3MoeConfig(**_SHARED, **_EXPERTS, head_dim=32),
}
"""The models that every family test runs over."""

FURTHER_MODELS: dict[str, Any] = {
    "llama_yarn": lambda: LlamaConfig(**_SHARED, **_rope("yarn"), mlp_bias=True),
    "llama_linear": lambda: LlamaConfig(**_SHARED, **_rope("linear")),
    "llama_dynamic": lambda: LlamaConfig(**_SHARED, **_TIED, **_rope("dynamic")),
    "mistral_tied_sliding": lambda: MistralConfig(**_SHARED, **_TIED, sliding_window=128, head_dim=24),
    "qwen2_sliding": lambda: Qwen2Config(
        **_SHARED, use_sliding_window=True, sliding_window=128, max_window_layers=1
    ),
    "qwen2_yarn": lambda: Qwen2Config(**_SHARED, **_rope("yarn")),
    "qwen3_sliding": lambda: Qwen3Config(
        **_SHARED, head_dim=32, use_sliding_window=True, sliding_window=128, max_window_layers=0
    ),
    "qwen3_moe_tied_mixed": lambda: Qwen3MoeConfig(
        **_SHARED, **_EXPERTS, **_TIED, head_dim=16, mlp_only_layers=[0], use_sliding_window=True, sliding_window=128
    ),
}
"""Further members of the families: rope scaling, sliding windows, mixed layers; the family matrix takes them too."""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """256 bytes, then <s> 256, </s> 257, <pad> 258."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def make_pico(name: str, folder: Path, **save: Any) -> Path:
    """Write a pico model with its tokenizer; biases and norms are random too."""
    models = PICO_MODELS | FURTHER_MODELS
    torch.manual_seed(sorted(models).index(name))
    model = AutoModelForCausalLM.from_config(models[name]())
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias") or "norm" in key:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder, **save)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def pico_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folder of every pico model, by name."""
    root = tmp_path_factory.mktemp("pico")
    return {name: make_pico(name, root / name) for name in PICO_MODELS}


@pytest.fixture(scope="session")
def pico_llama(pico_models: dict[str, Path]) -> Path:
    return pico_models["llama"]


@pytest.fixture(params=sorted(PICO_MODELS))
def pico(request: pytest.FixtureRequest, pico_models: dict[str, Path]) -> Path:
    """Folder of a pico model; the test runs once for each."""
    return pico_models[request.param]
