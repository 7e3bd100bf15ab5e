"""The cache: any way to cut a text into calls, any padding, rows reordered, repeated, selected, moved."""

import copy
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from nha_convert.convert import load_student
from nha_convert.modeling.cache_nha import NHACache, NHACacheLayer
from nha_convert.settings import NHASettings

WINDOW = 6
LONGEST = 5 * WINDOW + 20
VARIANTS: dict[str, dict[str, Any]] = {
    "all": {},
    "mixed": {"full_attention_layers": [1]},
    "no sinks": {"sinks": 0},
    "recurrent": {"window": 0},
    "unequal": {"window": [3, 11], "slots": 40, "sinks": 5},
    "rotated slots": {"slot_rotary": True},
    "routed": {"gate": "routed", "slot_rotary": True},
}
FAMILIES = ("llama_tied_rope", "qwen2", "qwen3", "mistral", "qwen3_moe", "qwen3_tied", "llama")
"""The pico model of each variant."""
BEFORE = (WINDOW - 1, WINDOW, WINDOW + 1, 5 * WINDOW)
ENDS = {"one token each": range(14), "many tokens": [0], "chunks": [0, 5]}


def ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def students(pico_models: dict[str, Path]) -> dict[str, Any]:
    """One student per variant, each of another family."""
    return {
        variant: load_student(pico_models[name], NHASettings(**{"window": WINDOW, "slots": 8, "sinks": 2, **changes}))
        for name, (variant, changes) in zip(FAMILIES, VARIANTS.items(), strict=True)
    }


@torch.no_grad()
def in_pieces(model: Any, tokens: torch.Tensor, mask: torch.Tensor | None, cuts: list[int]) -> torch.Tensor:
    """Logits of `tokens`, read in pieces that end at `cuts` and at the end."""
    cache, pieces, start = None, [], 0
    positions = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
    for end in [*cuts, tokens.shape[1]]:
        out = model(
            tokens[:, start:end],
            attention_mask=None if mask is None else mask[:, :end],
            position_ids=None if positions is None else positions[:, start:end],
            past_key_values=cache,
            use_cache=True,
        )
        cache, start = out.past_key_values, end
        pieces.append(out.logits)
    return torch.cat(pieces, 1)


def at_once(model: Any, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    positions = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("rest", ENDS)
def test_cached_is_the_full_forward(students: dict[str, Any], variant: str, before: int, rest: str) -> None:
    tokens = ids(2, before + 14, seed=before)
    cut = in_pieces(students[variant], tokens, None, [before + end for end in ENDS[rest]])
    difference = (cut - at_once(students[variant], tokens)).abs().max()
    assert difference <= 1e-5, difference  # acceptance row: fp32, the paths sum in different orders


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_split_gives_the_same_logits(students: dict[str, Any], data: st.DataObject) -> None:
    """Prefill in any chunks, decoding in between, any padding in two rows: always the full forward pass."""
    model = students[data.draw(st.sampled_from(sorted(VARIANTS)), "variant")]
    length = data.draw(st.integers(2, LONGEST), "length")
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=12), "cuts"))
    tokens = ids(2, length, seed=data.draw(st.integers(0, 9), "seed"))
    mask = None
    if data.draw(st.booleans(), "padded"):
        mask = torch.ones(2, length, dtype=torch.long)
        mask[0, torch.tensor(data.draw(st.lists(st.integers(0, length - 1), max_size=length - 1), "gone")).long()] = 0
        mask[1, : data.draw(st.integers(0, length - 1), "left")] = 0
        tokens = tokens.masked_fill(mask == 0, 258)
    real = slice(None) if mask is None else mask.bool()
    difference = (in_pieces(model, tokens, mask, cuts) - at_once(model, tokens, mask))[real].abs()
    assert difference.numel() == 0 or difference.max() <= 1e-5, difference.max()


MASKS = {
    "left": [[0] * 9 + [1] * 14, [1] * 23],
    "right": [[1] * 14 + [0] * 9, [1] * 23],
    "both": [[0] * 4 + [1] * 14 + [0] * 5, [1] * 22 + [0]],
    "holes": [[1, 0] * 11 + [1], [1] * 3 + [0] * 15 + [1] * 5],
    "one row": [[0] * 8 + [1] * 10 + [0] * 5],
    "nothing": [[0] * 23, [1] * 23],
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("cuts", [[], [5, 12, 13, 14]], ids=["at once", "in pieces"])
def test_a_padded_row_is_the_row_alone(students: dict[str, Any], variant: str, name: str, cuts: list[int]) -> None:
    model, mask = students[variant], torch.tensor(MASKS[name])
    tokens = ids(len(mask), 23).masked_fill(mask == 0, 258)
    logits = in_pieces(model, tokens, mask, cuts) if cuts else at_once(model, tokens, mask)
    for row, there in enumerate(mask.bool()):
        if there.any():
            alone = at_once(model, tokens[row : row + 1, there])
            assert (logits[row, there] - alone[0]).abs().max() <= 1e-5


def offload(cache: Any) -> None:
    for layer in cache.layers:
        if isinstance(layer, NHACacheLayer):
            layer.offload()


@pytest.mark.parametrize("variant", ["all", "mixed"])
@torch.no_grad()
def test_rows_of_a_cache(students: dict[str, Any], variant: str) -> None:
    """Reorder, repeat, select and reset do to the state what they do to keys and values."""
    model, tokens, following = students[variant], ids(3, 20), ids(3, 1, seed=1)
    cache = model(tokens, use_cache=True).past_key_values

    def go_on(cache: Any, rows: list[int], step: torch.Tensor) -> None:
        wanted = at_once(model, torch.cat((tokens[rows], step), 1))[:, -1]
        assert (model(step, past_key_values=cache).logits[:, -1] - wanted).abs().max() <= 1e-5

    for rows, change in (
        ([2, 0, 0], lambda c: c.reorder_cache(torch.tensor([2, 0, 0]))),
        ([0, 0, 1, 1, 2, 2], lambda c: c.batch_repeat_interleave(2)),
        ([2], lambda c: c.batch_select_indices(torch.tensor([2]))),
        ([0, 1, 2], offload),
    ):
        changed = copy.deepcopy(cache)
        change(changed)
        go_on(changed, rows, following[:1].expand(len(rows), 1))
    go_on(cache, [0, 1, 2], following)  # the copies changed, this one did not
    cache.reset()
    assert cache.get_seq_length() == 0
    assert (model(tokens, past_key_values=cache).logits - at_once(model, tokens)).abs().max() <= 1e-5


def test_offloading_takes_full_layers_only(students: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    cache, moved = NHACache(students["mixed"].config, [0], offloading=True), []
    for index, layer in enumerate(cache.layers):
        for what in ("offload", "prefetch"):
            monkeypatch.setattr(layer, what, lambda index=index, what=what: moved.append((what, index)))
    for index in (0, 1):
        cache.offload(index)
        cache.prefetch(index + 1)
    assert moved == [("prefetch", 1), ("offload", 1), ("prefetch", 1)]
    with pytest.raises(ValueError, match="CUDA"):
        students["mixed"].new_cache(offloading=True)


def test_a_refused_crop_changes_nothing(students: dict[str, Any]) -> None:
    model = students["mixed"]
    cache = model(ids(1, 9), use_cache=True).past_key_values
    cache.layers.reverse()  # the full layer first
    with pytest.raises(ValueError, match="cropped"):
        cache.crop(-2)
    assert [layer.get_seq_length() for layer in cache.layers] == [9, 9]


def test_the_state_does_not_grow(students: dict[str, Any]) -> None:
    model = students["mixed"]
    with torch.no_grad():
        cache = model(ids(1, 50), use_cache=True).past_key_values
        before = sum(x.numel() for x in cache.layers[0].state.tensors().values())
        model(ids(1, 50), past_key_values=cache)
    assert sum(x.numel() for x in cache.layers[0].state.tensors().values()) == before
    assert cache.layers[1].keys.shape[2] == 100
