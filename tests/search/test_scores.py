"""Every measure finds the layer that was made to need distant tokens, and says the same again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from needy import LAYERS, LENGTH, NEEDY, small_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from nha_convert.convert import load_student
from nha_convert.errors import InputError
from nha_convert.modeling.attention_nha import nha_layers
from nha_convert.recipe import Recipe, embedded_teacher, load_recipe
from nha_convert.search.arrange import arranged
from nha_convert.search.attention_mass import far_attention
from nha_convert.search.auto import all_converted, choose_layers, prepared_text
from nha_convert.search.calibration import Calibration, calibration_text
from nha_convert.search.scores import divergences, layer_losses
from nha_convert.streamed import load_streamed

CONTEXT = 256
EVERY = range(LAYERS)


def measured(model: Path, words: Path, *overrides: str) -> tuple[Recipe, Any, Calibration]:
    recipe = small_recipe(model, words, *overrides)
    student = load_student(model, all_converted(recipe).nha)
    return recipe, student, calibration_text(recipe, AutoTokenizer.from_pretrained(model), CONTEXT)


@pytest.mark.parametrize("method", ["attention", "alignment", "kl", "restore"])
@pytest.mark.parametrize("branch", ["window", "both"])
def test_the_needy_layer_is_found(method: str, branch: str, needy_model: Path, words: Path) -> None:
    recipe, model, text = measured(needy_model, words, f"nha.full_attention_layers=auto:1:{method}")
    recipe.search.branch = branch  # type: ignore[assignment]
    record = choose_layers(recipe, model, text)
    assert record["full_attention_layers"] == [NEEDY]
    scores = record["scores"]
    assert scores.pop(str(NEEDY)) > 3 * max(scores.values())


def test_a_larger_window_loses_less(needy_model: Path, words: Path) -> None:
    _, model, text = measured(needy_model, words)
    for method in ("attention", "alignment", "kl", "restore"):
        losses = layer_losses(method, model, text, dict.fromkeys(EVERY, [4, 16, 64, LENGTH]), branch="window")[NEEDY]
        assert losses[4] > losses[16] > losses[64] > 10 * abs(losses[LENGTH]), method
        assert losses[LENGTH] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("at_once", [1, 5000, 2**24])
def test_attention_mass_is_that_of_the_whole_matrix(at_once: int, pico: Path) -> None:
    """Against the base model's own attention weights, in any cut of the queries."""
    base = AutoModelForCausalLM.from_pretrained(pico, attn_implementation="eager")
    recipe = small_recipe(pico, Path("unread"))
    model = load_student(pico, all_converted(recipe).nha)
    rows = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))
    found = far_attention(model, rows, {0: [0, 8], 1: [1, 8]}, at_once=at_once)
    weights = base(rows, output_attentions=True).attentions
    places = torch.arange(40)
    age = places[:, None] - places
    for layer, window in ((0, 0), (0, 8), (1, 1), (1, 8)):
        far = (age >= window) & (places >= recipe.nha.sinks)
        wanted = (weights[layer] * far).sum(-1).mean()
        assert found[layer][window] == pytest.approx(wanted.item(), abs=1e-5)


def test_attention_mass_minds_a_sliding_window(tmp_path: Path, pico_models: dict[str, Path]) -> None:
    """Where the teacher itself sees no farther than the window, nothing lies beyond it."""
    model = AutoModelForCausalLM.from_pretrained(pico_models["mistral"])
    model.config.sliding_window = 16
    model.save_pretrained(tmp_path)
    student = load_student(tmp_path, all_converted(small_recipe(tmp_path, Path("unread"))).nha)
    rows = torch.randint(0, 256, (1, 60), generator=torch.Generator().manual_seed(0))
    found = far_attention(student, rows, {0: [8, 16]})[0]
    assert found[8] > 0.1 and found[16] == 0


def test_losses_are_those_of_the_model_itself(needy_model: Path, words: Path) -> None:
    """`kl` of one layer is the KL of a model that was converted in this layer alone."""
    recipe, model, text = measured(needy_model, words)
    found = layer_losses("kl", model, text, dict.fromkeys(EVERY, [8]))
    others = [layer for layer in EVERY if layer != 1]
    alone = load_student(needy_model, recipe.nha.model_copy(update={"full_attention_layers": others}))
    assert found[1][8] == pytest.approx(divergences(alone, text, [{1: 8}])[0], rel=1e-5)
    every = divergences(model, text, [dict.fromkeys(EVERY, 8), dict.fromkeys(others, 8)])
    restored = layer_losses("restore", model, text, dict.fromkeys(EVERY, [8]))
    assert restored[1][8] == pytest.approx(every[0] - every[1], rel=1e-5)


def test_nothing_is_left_changed(needy_model: Path, words: Path) -> None:
    _, model, text = measured(needy_model, words)
    model.set_windows([5, "full", 7, 9])
    before = [(layer.nha_mode, layer.nha_window, layer.nha_branch) for _, layer in nha_layers(model)]
    for method in ("attention", "alignment", "kl", "restore"):
        layer_losses(method, model, text, dict.fromkeys(EVERY, [4, 8]), branch="window")
    with pytest.raises(RuntimeError), arranged(model, {0: 3}, "slots"):
        raise RuntimeError
    assert [(layer.nha_mode, layer.nha_window, layer.nha_branch) for _, layer in nha_layers(model)] == before
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for _, layer in nha_layers(model))


def test_the_seed_decides_what_is_measured(needy_model: Path, words: Path) -> None:
    records = []
    for seed in (3, 3, 4):
        recipe, model, text = measured(needy_model, words, f"seed={seed}")
        records.append(choose_layers(recipe, model, text))
    assert records[0] == records[1]
    assert records[0]["scores"] != records[2]["scores"]


def test_text_is_rows_of_the_training_part(needy_model: Path, words: Path) -> None:
    recipe = small_recipe(needy_model, words)
    tokenizer = AutoTokenizer.from_pretrained(needy_model)
    text = calibration_text(recipe, tokenizer, CONTEXT)
    assert text.rows.shape == (384 // LENGTH, LENGTH)
    assert (text.rows[:, 0] == tokenizer.bos_token_id).all()
    assert all(tokenizer.decode(row[1:]) in words.read_text() for row in text.rows)
    assert calibration_text(recipe, tokenizer, 64).length == 64
    with pytest.raises(InputError, match="reads rows of 20000; give more text or lower search.sequence_length"):
        calibration_text(small_recipe(needy_model, words, "search.sequence_length=20000"), tokenizer, 10**6)


def test_recall_of_the_embedded_teacher(words: Path) -> None:
    """Its second layer is the one that looks values up; without far tokens there the answers are gone."""
    overrides = ("nha.full_attention_layers=auto:1:recall", "search.tokens=2k", "search.sequence_length=400")
    recipe = load_recipe("demo", overrides)
    tokenizer = AutoTokenizer.from_pretrained(embedded_teacher())
    text = prepared_text(recipe, tokenizer)
    asked = text.questions(64)
    assert len(text.documents) == 4
    for document, (ids, places) in zip(text.documents, asked):
        spans = [span for span, distance in zip(document.answers, document.distances) if distance > 64]
        assert [ids[place] for place in places] == [i for a, b in spans for i in document.input_ids[a:b]]
    model = load_student(embedded_teacher(), all_converted(recipe).nha)
    record = choose_layers(recipe, model, text)
    assert record["full_attention_layers"] == [1]
    assert record["scores"]["1"] > 0.5


def test_recall_without_far_answers_is_refused(words: Path) -> None:
    recipe = load_recipe("demo", ["nha.full_attention_layers=auto:1:recall", "search.sequence_length=32"])
    with pytest.raises(InputError, match="rows of 32 tokens hold no answer stated more than 64 tokens before"):
        prepared_text(recipe, AutoTokenizer.from_pretrained(embedded_teacher()))


def test_an_unknown_method_is_refused(needy_model: Path, words: Path) -> None:
    _, model, text = measured(needy_model, words)
    with pytest.raises(ValueError, match="must be one of attention, alignment"):
        layer_losses("guess", model, text, {0: [8]})


def test_a_model_that_stays_on_disk_scores_the_same(needy_model: Path, words: Path, tmp_path: Path) -> None:
    """As `runtime.layers_at_once` has it."""
    recipe, model, text = measured(needy_model, words)
    options: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu"), "seed": recipe.seed}
    nha = all_converted(recipe).nha.model_copy(update={"gate_init": "horizons"})
    streamed = load_streamed(needy_model, nha, scratch=tmp_path, **options)
    for method in ("attention", "alignment", "kl", "restore"):
        windows = dict.fromkeys(EVERY, [8])
        wanted = layer_losses(method, model, text, windows, branch="window")
        found = layer_losses(method, streamed, text, windows, branch="window")
        assert [found[layer][8] for layer in EVERY] == pytest.approx([wanted[layer][8] for layer in EVERY], rel=1e-5)
