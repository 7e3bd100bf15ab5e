"""What all stages share: cut batches, schedules, precision, and nothing left behind in the model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from nha_kernels import blocks, tiles
from safetensors.torch import load_file
from stages import make_recipe, train
from transformers import AutoTokenizer

from nha_convert.convert import load_student
from nha_convert.train import run_stage
from nha_convert.train.objectives import make_objective
from nha_convert.train.wrapping import prepared


@pytest.mark.parametrize("index", [0, 1])
def test_cut_batches_train_the_same_weights(pico_llama: Path, text: Path, tmp_path: Path, index: int) -> None:
    """Four rows in one batch, or in micro-batches of two and two: the same metrics and, to rounding, weights."""
    results = []
    for micro in (None, 2):
        recipe = make_recipe(text, runtime={"device": "cpu", "logging_steps": 3, "micro_batch": micro})
        recipe.stages = [recipe.stages[index].model_copy(update={"batch_size": 4, "tokens": 4 * 4 * 48, "warmup": 0.0})]
        if index:
            recipe.stages[0].lora.dropout = 0.0
        model, (summary,) = train(pico_llama, tmp_path / str(micro), recipe)
        assert summary["steps"] == 4
        trained = load_file(tmp_path / str(micro) / "stages" / summary["stage"] / "trained.safetensors")
        results.append((torch.cat([trained[name].flatten() for name in sorted(trained)]), summary["last"]))
    # Adam divides by the gradient's size, so rounding of small gradients grows to a share of the rate
    rate = recipe.stages[0].learning_rate
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=0.05 * rate)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-3)


@pytest.mark.parametrize("setting", [{"gradient_checkpointing": True}, {"dtype": "bfloat16"}])
def test_settings_that_only_round_train_alike(
    pico_llama: Path, text: Path, uninterrupted: dict[str, Any], tmp_path: Path, setting: dict[str, Any]
) -> None:
    recipe = make_recipe(text, runtime={"device": "cpu", "logging_steps": 3, **setting})
    model, summaries = train(pico_llama, tmp_path, recipe)
    assert model.dtype == getattr(torch, recipe.runtime.dtype)
    exact = "dtype" not in setting
    for mine, theirs in zip(summaries, uninterrupted["summaries"]):
        for place in ("first", "last"):
            assert mine[place] == pytest.approx(theirs[place], rel=1e-4 if exact else 0.05)


@pytest.mark.slow
def test_checkpointing_and_compilation_are_on_inside_and_off_after(pico_llama: Path, text: Path) -> None:
    """The same loss and gradients to rounding, from layers that are computed again and parts that are compiled."""
    results = []
    for setting in ({}, {"gradient_checkpointing": True}, {"compile": True}):
        recipe = make_recipe(text, runtime={"device": "cpu", **setting})
        recipe.stages[1].lora.dropout = 0.0
        model = load_student(pico_llama, recipe.nha, dtype=torch.float32, seed=3)
        objective = make_objective(model, recipe.stages[1], seed=3)
        calls: list[int] = []
        for layer in model.model.layers:
            layer.self_attn.o_proj.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        input_ids = torch.randint(0, 256, (2, 48), generator=torch.Generator().manual_seed(0))
        batch = {"input_ids": input_ids, "labels": input_ids, "position_ids": torch.arange(48).expand(2, -1)}
        objective.train()
        with prepared(model, recipe.runtime):
            compiled = [layer.mlp._compiled_call_impl is not None for layer in model.model.layers]
            loss, _ = objective(batch, objective.count(batch))
            loss.backward()
        assert all(compiled) is any(compiled) is ("compile" in setting)
        assert len(calls) == 2 * (3 if "gradient_checkpointing" in setting else 2)  # teacher, student, student again
        assert all(layer.mlp._compiled_call_impl is None for layer in model.model.layers)
        assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        learned = [tensor for group in objective.groups() for tensor in group["params"]]
        results.append([loss.detach(), *(tensor.grad for tensor in learned)])
    for result in results[1:]:
        for found, wanted in zip(result, results[0]):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())


def test_schedules(pico_llama: Path, text: Path, tmp_path: Path) -> None:
    """Rates by step: a rise from 0, then a cosine, a plateau that falls at its end, or a plateau."""
    rates = {}
    for schedule, extra in (("cosine", {}), ("wsd", {"decay": 0.4}), ("constant", {})):
        recipe = make_recipe(text, runtime={"device": "cpu", "logging_steps": 1})
        changes = {"tokens": 10 * 96, "warmup": 0.2, "schedule": schedule, **extra}
        recipe.stages = [recipe.stages[0].model_copy(update=changes)]
        train(pico_llama, tmp_path / schedule, recipe)
        lines = (tmp_path / schedule / "metrics.jsonl").read_text().splitlines()
        rates[schedule] = [json.loads(line)["lr"] / 0.02 for line in lines]
    assert all(values[:3] == [0, 0.5, 1] for values in rates.values())
    assert rates["cosine"][6] == pytest.approx(0.5) and rates["cosine"][9] < 0.05
    assert rates["wsd"] == pytest.approx([0, 0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    assert rates["constant"][2:] == [1] * 8


def test_the_model_comes_back_as_it_was_lent(uninterrupted: dict[str, Any], pico_llama: Path, text: Path) -> None:
    model = uninterrupted["model"]
    recipe = make_recipe(text)
    fresh = load_student(pico_llama, recipe.nha, dtype=torch.float32, seed=3)
    assert model.config.use_cache is fresh.config.use_cache is True
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in fresh.named_parameters()]
    assert type(model) is type(fresh)
    assert not model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_nothing_is_drawn_where_there_is_no_terminal(
    pico_llama: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(text)
    recipe.stages = [recipe.stages[0].model_copy(update={"tokens": 2 * 96})]
    model = load_student(pico_llama, recipe.nha, dtype=torch.float32, seed=3)
    tokenizer = AutoTokenizer.from_pretrained(pico_llama)
    capsys.readouterr()
    run_stage(model, tokenizer, recipe, 0, tmp_path, quiet=False)
    assert capsys.readouterr() == ("", "")


def test_a_plan_in_the_same_process_changes_nothing(pico_llama: Path, text: Path) -> None:
    """Plans run a step on tensors without memory; no constant of theirs may reach a real step."""
    from nha_convert.plan_memory import stage_cost

    recipe = make_recipe(text, model=str(pico_llama))
    input_ids = torch.randint(0, 256, (2, 48), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": input_ids, "labels": input_ids, "position_ids": torch.arange(48).expand(2, -1)}
    losses = []
    for _ in range(2):
        model = load_student(pico_llama, recipe.nha, dtype=torch.float32, seed=3)
        losses.append(make_objective(model, recipe.stages[0], seed=3)(batch, 2)[0])
        blocks._band.cache_clear()
        tiles._sums.cache_clear()
        tiles._triangle.cache_clear()
        stage_cost(recipe, 0)
    assert type(losses[1]) is torch.Tensor and torch.equal(losses[0], losses[1])
