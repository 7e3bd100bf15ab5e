"""A tokenizer that has one-token words (the pico byte tokenizer has none) and a pico Llama with its vocabulary."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = 96


@pytest.fixture(scope="session")
def word_tokenizer() -> PreTrainedTokenizerFast:
    """256 bytes, 96 words with their leading space, <s>, </s>, <pad>."""
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces += ["Ġ" + "".join(letters) for letters in itertools.islice(itertools.product("abcde", repeat=3), WORDS)]
    tokenizer = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.fixture(scope="session")
def words(word_tokenizer: Any) -> set[int]:
    """Ids of the words."""
    return set(range(256, 256 + WORDS))


@pytest.fixture(scope="session")
def filler() -> list[int]:
    """Ordinary text without a word in it."""
    return [(7 * index + index // 31) % 200 for index in range(4096)]


@pytest.fixture(scope="session")
def word_llama(tmp_path_factory: pytest.TempPathFactory, word_tokenizer: Any) -> Path:
    """Folder of a random two-layer Llama with the word tokenizer."""
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=len(word_tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.15,
        bos_token_id=word_tokenizer.bos_token_id,
        eos_token_id=word_tokenizer.eos_token_id,
    )
    folder = tmp_path_factory.mktemp("word_llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    word_tokenizer.save_pretrained(folder)
    return folder
