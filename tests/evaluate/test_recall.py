"""Recall by generation: an oracle, models that know nothing, and what does not fit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nha_convert.convert import load_student
from nha_convert.evaluate.recall import prompt_span, recall_by_generation, recall_distances, wilson_interval
from nha_convert.settings import NHASettings


class Reader(torch.nn.Module):
    """Answers from the prompt itself: the words that followed the asked key, plus `shift` if it is to be wrong.

    Keys, values and nothing else are words; the asked key is the last word of a prompt.
    """

    device = torch.device("cpu")

    def __init__(self, words: set[int], shift: int = 0, wrong: int = 1) -> None:
        super().__init__()
        self.words, self.shift, self.wrong = words, shift, wrong
        self.prompts: list[list[int]] = []

    def generate(self, ids: torch.Tensor, attention_mask: torch.Tensor, generation_config: Any) -> torch.Tensor:
        assert attention_mask.shape == ids.shape and attention_mask.all()
        rows = []
        for prompt in ids.tolist():
            self.prompts.append(prompt)
            seen = [token for token in prompt if token in self.words]
            step = generation_config.max_new_tokens + 1  # a key and its value
            place = next(index for index in range(0, len(seen) - 1, step) if seen[index] == seen[-1])
            answer = seen[place + 1 : place + step]
            rows.append(prompt + [*answer[: -self.wrong], *(word + self.shift for word in answer[-self.wrong :])])
        return torch.tensor(rows)


@pytest.mark.parametrize("value_length", [1, 2])
def test_oracle_is_perfect(word_tokenizer: Any, words: set[int], filler: list[int], value_length: int) -> None:
    oracle = Reader(words)
    result = recall_by_generation(
        oracle, word_tokenizer, filler, distances=[64, 128], pairs=5, prompts=24, span=300, value_length=value_length
    )
    assert list(result) == ["64", "128"]
    for cell in result.values():
        assert cell["exact_match"] == 1 and cell["prompts"] == 24 and cell["high"] == 1
        assert 0.8 < cell["low"] < 0.9 and cell["span"] <= 300
    assert len(oracle.prompts) == 48
    assert {len(prompt) for prompt in oracle.prompts} == {1 + cell["span"] for cell in result.values()}
    assert all(prompt[0] == word_tokenizer.bos_token_id for prompt in oracle.prompts)
    assert len(set(map(tuple, oracle.prompts))) == 48


def test_one_wrong_token_is_a_wrong_answer(word_tokenizer: Any, words: set[int], filler: list[int]) -> None:
    result = recall_by_generation(
        Reader(words, shift=1), word_tokenizer, filler, distances=[64], pairs=5, prompts=16, value_length=3
    )
    assert result["64"]["exact_match"] == 0 and result["64"]["low"] == 0


def test_everyone_is_asked_the_same(word_tokenizer: Any, words: set[int], filler: list[int]) -> None:
    asked = []
    for distances in ([64, 128], [128]):
        reader = Reader(words)
        recall_by_generation(reader, word_tokenizer, filler, distances=distances, pairs=5, prompts=8, span=300)
        asked.append(reader.prompts)
    assert asked[0][8:] == asked[1] and len(asked[1]) == 8


def test_a_prompt_grows_until_its_pairs_fit(word_tokenizer: Any, words: set[int], filler: list[int]) -> None:
    settings = {"distances": [64], "pairs": 12, "prompts": 8}
    cell = recall_by_generation(Reader(words), word_tokenizer, filler, span=1000, **settings)["64"]
    assert cell["exact_match"] == 1 and cell["span"] == 2 * prompt_span(64, 12, 1000) == 384
    assert "left_out" in recall_by_generation(Reader(words), word_tokenizer, filler, span=200, **settings)["64"]


def test_distance_is_exact(word_tokenizer: Any, words: set[int], filler: list[int]) -> None:
    """From the end of the asked statement (at most 4 byte tokens after its value) to the end of the prompt."""
    reader = Reader(words)
    recall_by_generation(reader, word_tokenizer, filler, distances=[96], pairs=5, prompts=8, span=300)
    for prompt in reader.prompts:
        places = [index for index, token in enumerate(prompt) if token in words]
        key = next(index for index in places if prompt[index] == prompt[places[-1]])
        value = places[places.index(key) + 1]
        assert 96 <= len(prompt) - 1 - value <= 96 + 4


@torch.no_grad()
def test_random_model_knows_nothing(word_llama: Path, word_tokenizer: Any, filler: list[int], capsys: Any) -> None:
    model = load_student(word_llama, NHASettings(window=16, slots=8))
    capsys.readouterr()
    result = recall_by_generation(model, word_tokenizer, filler, distances=[32, 64], pairs=4, prompts=16, span=200)
    assert [cell["exact_match"] for cell in result.values()] == [0, 0]
    assert capsys.readouterr() == ("", "")


@torch.no_grad()
def test_decoding_is_greedy_and_cached(
    word_llama: Path, word_tokenizer: Any, filler: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_student(word_llama, NHASettings(window=16, slots=8))
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=3.0, max_new_tokens=50)
    outputs: list[torch.Tensor] = []
    caches: list[bool] = []
    generate, forward = model.generate, model.forward

    def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
        outputs.append(generate(*args, **kwargs))
        return outputs[-1]

    def record(*args: Any, **kwargs: Any) -> Any:
        caches.append(kwargs.get("past_key_values") is not None and kwargs["input_ids"].shape[1] == 1)
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "generate", spy)
    monkeypatch.setattr(model, "forward", record)
    recall_by_generation(model, word_tokenizer, filler, distances=[64], pairs=3, prompts=4, span=128, value_length=4)
    assert caches == [False, True, True, True]
    (rows,) = outputs
    assert rows.shape[1] <= 1 + 128 + 4
    for position in range(129, rows.shape[1]):
        expected = forward(input_ids=rows[:, :position]).logits[:, -1].argmax(-1)
        alive = ~(rows[:, 129:position] == model.config.eos_token_id).any(-1)
        assert torch.equal(rows[alive, position], expected[alive])


def test_rows_that_all_end_early_are_wrong(word_tokenizer: Any, filler: list[int]) -> None:
    class Silent(Reader):
        def generate(self, ids: torch.Tensor, **_: Any) -> torch.Tensor:
            return torch.cat((ids, torch.full((len(ids), 1), word_tokenizer.eos_token_id)), 1)

    result = recall_by_generation(
        Silent(set()), word_tokenizer, filler, distances=[64], pairs=3, prompts=4, value_length=2
    )
    assert result["64"]["exact_match"] == 0


def test_pairs_that_do_not_fit_are_left_out(word_tokenizer: Any, words: set[int], filler: list[int]) -> None:
    result = recall_by_generation(Reader(words), word_tokenizer, filler, distances=[64], pairs=60, prompts=8, span=128)
    assert "do not fit" in result["64"]["left_out"] and "exact_match" not in result["64"]


def test_distances_that_fit_the_context() -> None:
    assert recall_distances([2, 4, 8, 16], 64, 1024, 1) == ([128, 256, 512], [1024])
    assert recall_distances([2, 4, 8, 16], 64, 1280, 1) == ([128, 256, 512, 1024], [])
    assert recall_distances([4, 2, 2], 32, 131072, 1) == ([64, 128], [])
    assert prompt_span(64, 16, 1024) == 256 and prompt_span(512, 16, 1000) == 1000


def test_wilson_interval() -> None:
    low, high = wilson_interval(8, 10)
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    for bound in (low, high):  # the definition: shares from which 0.8 is 1.96 standard errors away
        assert abs(0.8 - bound) == pytest.approx(1.96 * (bound * (1 - bound) / 10) ** 0.5)
    assert wilson_interval(0, 32) == pytest.approx((0, 0.1072), abs=1e-4)
    assert wilson_interval(32, 32)[1] == pytest.approx(1)
    assert wilson_interval(0, 0) == (0, 1)
