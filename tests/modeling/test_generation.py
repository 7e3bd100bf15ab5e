"""`generate`: every way to decode gives with the cache what it gives without one, alone what it gives in a batch."""

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from nha_convert.convert import load_student
from nha_convert.settings import NHASettings

WINDOW = 6
GREEDY: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}
LENGTHS = (23, 9, 3)


def ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


def student(folder: Path, **settings: Any) -> Any:
    return load_student(folder, NHASettings(**{"window": WINDOW, "slots": 8, "sinks": 2, **settings}))


def padded(prompts: list[torch.Tensor], side: str = "left") -> dict[str, torch.Tensor]:
    """A batch of prompts of different lengths."""
    longest = max(prompt.shape[1] for prompt in prompts)
    tokens = torch.full((len(prompts), longest), 258)
    mask = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        there = slice(longest - prompt.shape[1], None) if side == "left" else slice(0, prompt.shape[1])
        tokens[row, there], mask[row, there] = prompt[0], 1
    return {"input_ids": tokens, "attention_mask": mask}


@pytest.fixture(scope="module")
def mixed(pico_llama: Path) -> Any:
    """One NHA layer, one retained full-attention layer."""
    return student(pico_llama, full_attention_layers=[1])


@torch.no_grad()
def test_greedy_cached_is_uncached(pico: Path) -> None:
    model = student(pico, window=[3, "full"])
    prompt, options = ids(2, 5), {**GREEDY, "max_new_tokens": 14}  # ends more than 4 windows past the window
    assert torch.equal(model.generate(prompt, **options), model.generate(prompt, use_cache=False, **options))


@torch.no_grad()
@pytest.mark.parametrize("full_layers", [[], [1]])
def test_a_left_padded_batch_is_each_prompt_alone(pico: Path, full_layers: list[int]) -> None:
    assert other_than_alone(student(pico, full_attention_layers=full_layers), {}) == []


@torch.no_grad()
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prefill_chunk_size": 4}])
def test_padded_beams_and_chunks_are_each_prompt_alone(mixed: Any, options: dict[str, Any]) -> None:
    assert other_than_alone(mixed, options) == []


def other_than_alone(model: Any, options: dict[str, Any]) -> list[int]:
    """Rows of a left-padded batch that give other tokens than their prompt alone."""
    prompts = [ids(1, length, seed) for seed, length in enumerate(LENGTHS)]
    together = model.generate(**padded(prompts), **GREEDY, **options)[:, max(LENGTHS) :]
    options = {} if "prefill_chunk_size" in options else options
    alone = [model.generate(prompt, **GREEDY, **options)[0, prompt.shape[1] :] for prompt in prompts]
    return [row for row, tokens in enumerate(alone) if not torch.equal(together[row], tokens)]


@torch.no_grad()
def test_one_padded_row_is_the_row_alone(mixed: Any) -> None:
    prompt = ids(1, 9)
    inputs = padded([prompt, ids(1, 23)])
    alone = {name: tensor[:1] for name, tensor in inputs.items()}
    assert torch.equal(mixed.generate(**alone, **GREEDY)[0, 23:], mixed.generate(prompt, **GREEDY)[0, 9:])


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 4},
        {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.5, "early_stopping": True, "eos_token_id": 7},
        {"num_beams": 3, "do_sample": True, "top_k": 20},
        {"num_return_sequences": 2, "do_sample": True, "top_k": 20},
        {"do_sample": True, "top_p": 0.8, "temperature": 0.7, "min_p": 0.01},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"bad_words_ids": [[5], [17, 3]], "min_new_tokens": 4, "eos_token_id": 9},
        {"guidance_scale": 1.5, "negative_prompt_ids": torch.arange(8).view(2, 4)},
        {"prefill_chunk_size": 4},
        {"prefill_chunk_size": 5, "num_beams": 2},
        {"inputs_embeds": True},
        {"inputs_embeds": True, "num_beams": 2},
    ],
    ids=lambda options: " ".join(f"{key}={value}" for key, value in options.items())[:60],
)
def test_other_ways_to_generate(mixed: Any, options: dict[str, Any]) -> None:
    inputs = padded([ids(1, 13), ids(1, 8, seed=1)])
    options = dict(options)
    if options.pop("inputs_embeds", False):
        inputs["inputs_embeds"] = mixed.get_input_embeddings()(inputs.pop("input_ids"))
    results = []
    for use_cache in (True, False):
        if not use_cache:
            options.pop("prefill_chunk_size", None)
        torch.manual_seed(5)
        results.append(mixed.generate(**inputs, use_cache=use_cache, **{**GREEDY, **options}))
    assert torch.equal(*results)
    assert results[0].shape[1] > 4


@torch.no_grad()
def test_beam_search_of_every_family(pico: Path) -> None:
    """Acceptance row: beam search with cache gives the tokens that it gives without."""
    model = student(pico)
    options = {**GREEDY, "num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 20}
    inputs = padded([ids(1, 13), ids(1, 5, seed=1)])
    assert torch.equal(model.generate(**inputs, **options), model.generate(**inputs, use_cache=False, **options))


@torch.no_grad()
@pytest.mark.parametrize("more", [1, 9])
def test_generate_continues_a_returned_cache(mixed: Any, more: int) -> None:
    """With one or many new tokens: as a chat goes on."""
    prompt = ids(1, 13)
    first = mixed.generate(prompt, return_dict_in_generate=True, **{**GREEDY, "max_new_tokens": 6})
    cache = copy.deepcopy(first.past_key_values)
    longer = torch.cat((first.sequences, ids(1, more, seed=1)), 1)
    rest = mixed.generate(longer, past_key_values=cache, **GREEDY)
    assert torch.equal(rest, mixed.generate(longer, **GREEDY))
    assert first.past_key_values.get_seq_length() == 13 + 5  # the copy advanced, this one did not


@torch.no_grad()
def test_streaming_and_stopping(mixed: Any, tokenizer: Any) -> None:
    prompt = tokenizer("two words", return_tensors="pt").input_ids
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    thread = threading.Thread(target=mixed.generate, args=(prompt,), kwargs={**GREEDY, "streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    whole = mixed.generate(prompt, **GREEDY)[0, prompt.shape[1] :]
    assert len(pieces) > 1 and "".join(pieces) == tokenizer.decode(whole)

    def fifth(input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= prompt.shape[1] + 5)

    def odd_only(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.index_fill(1, torch.arange(0, scores.shape[1], 2), float("-inf"))

    changed = mixed.generate(
        prompt,
        logits_processor=LogitsProcessorList([odd_only]),
        stopping_criteria=StoppingCriteriaList([fifth]),
        **GREEDY,
    )
    assert changed.shape[1] == prompt.shape[1] + 5 and (changed[0, prompt.shape[1] :] % 2 == 1).all()


@torch.no_grad()
def test_scores_are_the_logits(mixed: Any) -> None:
    out = mixed.generate(
        ids(2, 7), return_dict_in_generate=True, output_logits=True, output_hidden_states=True, **GREEDY
    )
    full = mixed(out.sequences[:, :-1]).logits[:, 6:]
    assert (torch.stack(out.logits, 1) - full).abs().max() <= 1e-5
    assert len(out.hidden_states) == 16


def test_assistants_are_refused(mixed: Any, pico_llama: Path) -> None:
    prompt, teacher = ids(1, 5), AutoModelForCausalLM.from_pretrained(pico_llama)
    for options in ({"assistant_model": teacher}, {"prompt_lookup_num_tokens": 2}, {"assistant_early_exit": 1}):
        with pytest.raises(ValueError, match="stateful"):
            mixed.generate(prompt, **GREEDY, **options)
    with pytest.raises(ValueError, match="assist"):
        teacher.generate(prompt, assistant_model=mixed, **GREEDY)


def test_other_caches_are_refused(mixed: Any) -> None:
    prompt = ids(1, 5)
    static = StaticCache(config=mixed.config, max_cache_len=32)
    for options, words in (
        ({"cache_implementation": "static"}, "static"),
        ({"cache_implementation": "offloaded_static"}, "offloaded_static"),
        ({"cache_implementation": "quantized"}, "quantized"),
        ({"cache_implementation": "offloaded"}, "CUDA"),
        ({"past_key_values": DynamicCache(config=mixed.config)}, "new_cache"),
        ({"past_key_values": static}, "new_cache"),
    ):
        with pytest.raises(ValueError, match=words):
            mixed.generate(prompt, **GREEDY, **options)
    for cache in (DynamicCache(config=mixed.config), static):
        with pytest.raises(ValueError, match="new_cache"):
            mixed(prompt, past_key_values=cache)


def test_continuous_batching_is_refused(mixed: Any) -> None:
    with pytest.raises(AttributeError, match="continuous"):
        mixed.init_continuous_batching()
    with pytest.raises(AttributeError, match="continuous"):
        mixed.generate_batch([[1, 2, 3]])
    with pytest.raises(ValueError, match="continuous"):
        mixed(ids(1, 5), cache=object())
    with pytest.raises(AttributeError, match="continuous"):
        mixed.generate_batch([[1, 2, 3]], generation_config=GenerationConfig(max_new_tokens=2))


def test_masks_that_are_not_2d_are_refused(mixed: Any) -> None:
    with pytest.raises(ValueError, match="2D"):
        mixed(ids(1, 5), attention_mask=torch.ones(1, 1, 5, 5))
