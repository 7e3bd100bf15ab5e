"""Packed documents against the same documents alone, in every family: logits, loss and gradients."""

from pathlib import Path

from packed_check import SIZES, packed_against_alone, packed_rows
from transformers import PreTrainedTokenizerFast


def test_packed_is_as_alone(pico: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = packed_rows(tmp_path, tokenizer)
    found = packed_against_alone(pico, rows)
    assert found["documents"] > len(SIZES) > len(rows) and found["parameters"] > 20
    assert found["logits"] <= 1e-5
    assert found["loss"] <= 1e-5
    assert found["gradients"] <= 1e-4


def test_the_check_sees_documents_that_are_not_apart(
    pico_llama: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    found = packed_against_alone(pico_llama, packed_rows(tmp_path, tokenizer), told=False)
    assert found["logits"] > 0.1 and found["gradients"] > 0.1
