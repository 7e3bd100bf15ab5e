"""What the tests of data share: a tokenizer with words, recipes, text that says nothing twice."""

import random
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nha_convert.recipe import Recipe

WORDS = sorted({"".join(random.Random(i).choices("abcdefgh", k=3)) for i in range(90)})


def word_tokenizer(bos: str | None) -> PreTrainedTokenizerFast:
    """Bytes, and each of `WORDS` with its leading space as one token."""
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = []
    for word in WORDS:
        piece = "Ġ"
        for letter in word:
            if piece + letter not in vocabulary:
                vocabulary[piece + letter] = len(vocabulary)
                merges.append((piece, letter))
            piece += letter
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos)


def make_recipe(sources: list[dict[str, Any]], **data_settings: Any) -> Recipe:
    stage = {"kind": "align", "tokens": 64 * 96, "sequence_length": 96, "batch_size": 4}
    return Recipe.model_validate(
        {
            "model": "pico",
            "output": "unused",
            "data": {"sources": sources, **data_settings},
            "stages": [stage, stage],
            "evaluate": {"sequence_length": 64},
        }
    )


def as_text(tokenizer: PreTrainedTokenizerFast, ids: torch.Tensor) -> str:
    return tokenizer.decode(ids.tolist(), skip_special_tokens=True)
