"""Cache, padding and generation: every way to compute the same tokens gives the same tokens."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from nha_convert.convert import load_student
from nha_convert.modeling.cache_nha import NHACacheLayer
from nha_convert.settings import NHASettings

WINDOW = 6
GREEDY: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}


def ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


def student(folder: Path, **settings: Any) -> Any:
    return load_student(folder, NHASettings(**{"window": WINDOW, "slots": 8, "sinks": 2, **settings}))


@pytest.fixture(scope="module")
def mixed(pico_llama: Path) -> Any:
    """One NHA layer, one retained full-attention layer."""
    return student(pico_llama, full_attention_layers=[1])


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"full_attention_layers": [0]}, {"window": 0, "sinks": 0}, {"slots": 40}])
def test_decode_is_the_full_forward(pico: Path, settings: dict[str, Any]) -> None:
    model = student(pico, **settings)
    tokens = ids(2, 5 * WINDOW + 3)  # decoding goes on for more than 4 windows past the window
    full = model(tokens, use_cache=False).logits
    out = model(tokens[:, :5], use_cache=True)
    steps = [out.logits]
    for t in range(5, tokens.shape[1]):
        out = model(tokens[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
        steps.append(out.logits)
    difference = (torch.cat(steps, 1) - full).abs().max()
    assert difference <= 1e-5, difference  # acceptance row: fp32, both paths sum in different orders


@torch.no_grad()
def test_chunked_prefill_and_a_continued_cache(pico: Path) -> None:
    model = student(pico, full_attention_layers=[1])
    tokens = ids(2, 41)
    full = model(tokens, use_cache=False).logits
    cache, pieces = model.new_cache(), []
    for piece in tokens.split([3, 17, 1, 9, 11], dim=1):
        pieces.append(model(piece, past_key_values=cache).logits)
    assert (torch.cat(pieces, 1) - full).abs().max() <= 1e-5
    assert cache.get_seq_length() == 41


@torch.no_grad()
@pytest.mark.parametrize("full_layers", [[], [1]])
def test_left_padded_batch_is_each_row_alone(pico: Path, full_layers: list[int]) -> None:
    model = student(pico, full_attention_layers=full_layers)
    lengths = [23, 9, 3]
    prompts = [ids(1, length, seed) for seed, length in enumerate(lengths)]
    batch = torch.full((3, 23), 258)
    mask = torch.zeros(3, 23, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        batch[row, 23 - lengths[row] :], mask[row, 23 - lengths[row] :] = prompt[0], 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(batch, attention_mask=mask, position_ids=positions).logits
    together = model.generate(batch, attention_mask=mask, **GREEDY)[:, 23:]
    for row, prompt in enumerate(prompts):
        alone = model(prompt).logits[0]
        assert (logits[row, 23 - lengths[row] :] - alone).abs().max() <= 1e-5
        assert torch.equal(together[row], model.generate(prompt, **GREEDY)[0, lengths[row] :])


@torch.no_grad()
def test_greedy_cached_is_uncached(pico: Path) -> None:
    model = student(pico, window=[3, "full"])
    prompt, options = ids(2, 5), {**GREEDY, "max_new_tokens": 14}  # ends more than 4 windows past the window
    assert torch.equal(model.generate(prompt, **options), model.generate(prompt, use_cache=False, **options))


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 3},
        {"num_return_sequences": 2, "do_sample": True, "top_k": 20},
        {"prefill_chunk_size": 4},
    ],
)
def test_other_ways_to_generate(mixed: Any, options: dict[str, Any]) -> None:
    prompt = ids(2, 13)
    results = []
    for use_cache in (True, False):
        if "prefill_chunk_size" in options and not use_cache:
            options = {}
        torch.manual_seed(5)
        results.append(mixed.generate(prompt, use_cache=use_cache, **{**GREEDY, **options}))
    assert torch.equal(*results)
    assert results[0].shape[1] == 13 + 16


@torch.no_grad()
def test_generate_continues_a_returned_cache(mixed: Any) -> None:
    prompt = ids(1, 13)
    first = mixed.generate(prompt, return_dict_in_generate=True, **{**GREEDY, "max_new_tokens": 6})
    cache = copy.deepcopy(first.past_key_values)
    rest = mixed.generate(first.sequences, past_key_values=cache, **{**GREEDY, "max_new_tokens": 10})
    assert torch.equal(rest, mixed.generate(prompt, **GREEDY))
    assert first.past_key_values.get_seq_length() == 13 + 5  # the copy advanced, this one did not


@torch.no_grad()
def test_generate_from_embeddings(mixed: Any) -> None:
    prompt = ids(2, 13)
    embedded = mixed.generate(inputs_embeds=mixed.get_input_embeddings()(prompt), **GREEDY)
    assert torch.equal(embedded, mixed.generate(prompt, **GREEDY)[:, 13:])


def test_the_state_does_not_grow(mixed: Any) -> None:
    with torch.no_grad():
        cache = mixed(ids(1, 50), use_cache=True).past_key_values
        before = sum(x.numel() for x in cache.layers[0].state.tensors().values())
        mixed(ids(1, 50), past_key_values=cache)
    assert isinstance(cache.layers[0], NHACacheLayer)
    assert sum(x.numel() for x in cache.layers[0].state.tensors().values()) == before
    assert cache.layers[1].keys.shape[2] == 100


def test_refusals(mixed: Any, pico_llama: Path) -> None:
    prompt = ids(1, 5)
    teacher = AutoModelForCausalLM.from_pretrained(pico_llama)
    for options, words in (
        ({"assistant_model": teacher}, "stateful"),
        ({"prompt_lookup_num_tokens": 2}, "stateful"),
        ({"cache_implementation": "static"}, "static"),
        ({"cache_implementation": "quantized"}, "quantized"),
        ({"cache_implementation": "offloaded"}, "offloaded"),
        ({"past_key_values": DynamicCache(config=mixed.config)}, "new_cache"),
    ):
        with pytest.raises(ValueError, match=words):
            mixed.generate(prompt, **GREEDY, **options)
    with pytest.raises(ValueError, match="assist"):
        teacher.generate(prompt, assistant_model=mixed, **GREEDY)
    with pytest.raises(ValueError, match="new_cache"):
        mixed(prompt, past_key_values=DynamicCache(config=mixed.config))
    with pytest.raises(ValueError, match="2D"):
        mixed(prompt, attention_mask=torch.ones(1, 1, 5, 5))
    with pytest.raises(ValueError, match="cropped"):
        mixed(prompt, use_cache=True).past_key_values.crop(-2)
    with pytest.raises(AttributeError, match="continuous"):
        mixed.init_continuous_batching()
    with pytest.raises(AttributeError, match="continuous"):
        mixed.generate_batch([[1, 2, 3]])
    with pytest.raises(ValueError, match="continuous"):
        mixed(prompt, cache=object())
