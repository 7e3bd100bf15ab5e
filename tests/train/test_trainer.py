"""What both stages share: accumulation, and nothing left behind in the model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from stages import make_recipe
from transformers import AutoTokenizer

from nha_convert.convert import load_student
from nha_convert.data import training_dataset
from nha_convert.train import run_stage
from nha_convert.train.align import AlignTrainer
from nha_convert.train.distill import DistillTrainer
from nha_convert.train.job import StageJob


@pytest.mark.parametrize("index", [0, 1])
def test_accumulated_batches_equal_one_large_batch(pico_llama: Path, text: Path, tmp_path: Path, index: int) -> None:
    """Four windows in one batch, or in two batches of two: the same metrics and, to rounding, the same weights."""
    results = []
    for batch, accumulation in ((4, 1), (2, 2)):
        recipe = make_recipe(text)
        stage = recipe.stages[index].model_copy(update={"batch_size": batch, "tokens": 4 * 4 * 48, "warmup": 0.0})
        if stage.kind == "distill":
            stage.lora.dropout = 0.0
        recipe.stages[index] = stage
        model = load_student(pico_llama, recipe.nha, dtype=torch.float32, seed=3)
        dataset = training_dataset(recipe, index, AutoTokenizer.from_pretrained(pico_llama))
        run_dir = tmp_path / f"{accumulation}"
        run_dir.mkdir()
        job = StageJob(recipe, index, run_dir, quiet=True)
        trainer: Any = (AlignTrainer if index == 0 else DistillTrainer)(model, job, dataset, accumulation)
        trainer.train()
        assert trainer.state.global_step == 4
        learned = torch.cat([t.detach().flatten() for group in trainer.groups for t in group["params"]])
        results.append((learned, trainer.meter.last))
    # Adam divides by the gradient's size, so rounding of small gradients grows to a share of the rate
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=0.05 * stage.learning_rate)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-3)


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
