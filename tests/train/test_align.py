"""The align stage: what its loss is, what it trains, what it spares, and how it fails."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stages import make_recipe, train

from nha_convert.convert import load_student
from nha_convert.errors import InputError, WorkError
from nha_convert.modeling.attention_nha import nha_layers
from nha_convert.train.align import AlignTrainer, alignment_error
from nha_convert.train.job import StageJob


def make_trainer(teacher: Path, recipe: Any, run_dir: Path) -> AlignTrainer:
    model = load_student(teacher, recipe.nha, dtype=torch.float32, seed=recipe.seed)
    return AlignTrainer(model, StageJob(recipe, 0, run_dir, quiet=True), [])


def direct_errors(model: Any, input_ids: torch.Tensor) -> list[torch.Tensor]:
    """Each layer's error from two plain calls of the layer, with an ordinary graph."""
    calls: list[Any] = []
    layers = [layer for _, layer in nha_layers(model)]
    for layer in layers:
        layer.nha_mode = "teacher"
    handles = [
        layer.register_forward_hook(lambda m, a, k, out: calls.append((m, a, k, out[0])), with_kwargs=True)
        for layer in layers
    ]
    with torch.no_grad():
        model(input_ids=input_ids, use_cache=False)
    for handle in handles:
        handle.remove()
    errors = []
    for layer, args, kwargs, wanted in calls:
        layer.nha_mode = "student"
        found = layer(*args, **kwargs)[0]
        ratios = [(f - w).pow(2).sum() / w.pow(2).sum() for f, w in zip(found, wanted)]
        errors.append(torch.stack(ratios).mean())
    return errors


def test_loss_and_gradients_are_those_of_the_definition(pico: Path, text: Path, tmp_path: Path) -> None:
    trainer = make_trainer(pico, make_recipe(text), tmp_path)
    input_ids = torch.randint(0, 256, (2, 48))
    loss, measured = trainer.losses(input_ids, input_ids)
    (3 * loss).backward()
    found = [tensor.grad for tensor in trainer.learned]
    errors = direct_errors(trainer.model, input_ids)
    wanted = torch.autograd.grad(3 * torch.stack(errors).mean(), trainer.learned)
    assert set(measured) == {"align/layer_00", "align/layer_01"}
    # one formula summed in two orders in fp32
    torch.testing.assert_close(torch.stack(list(measured.values())), torch.stack(errors), rtol=1e-5, atol=0)
    torch.testing.assert_close(loss, torch.stack(errors).mean(), rtol=1e-5, atol=0)
    for mine, theirs in zip(found, wanted):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6 * theirs.abs().max().item())


def test_error_of_zeros_is_one_and_of_the_teacher_zero() -> None:
    wanted = torch.randn(3, 5, 7)
    assert alignment_error(torch.zeros_like(wanted), wanted).item() == pytest.approx(1)
    assert alignment_error(wanted, wanted).item() == 0
    assert alignment_error(2 * wanted, wanted).item() == pytest.approx(1)


def test_no_graph_for_the_backbone_and_no_logits(pico_llama: Path, text: Path, tmp_path: Path) -> None:
    trainer = make_trainer(pico_llama, make_recipe(text), tmp_path)

    def refuse(*_: Any) -> None:
        raise AssertionError("the head was called")

    trainer.model.lm_head.register_forward_hook(refuse)
    seen: list[bool] = []
    for name, module in trainer.model.named_modules():
        if name.endswith(("q_proj", "k_proj", "v_proj", "mlp")):
            module.register_forward_hook(lambda m, a, out: seen.append(out.requires_grad))
    input_ids = torch.randint(0, 256, (2, 48))
    loss, _ = trainer.losses(input_ids, input_ids)
    loss.backward()
    assert seen and not any(seen)
    assert {name for name, tensor in trainer.model.named_parameters() if tensor.grad is not None} == {
        name for name, _ in trainer.model.named_parameters() if ".nha." in name
    }
    assert all(layer.nha_mode == "student" for _, layer in nha_layers(trainer.model))


def test_only_gates_change_and_the_error_falls(
    pico_llama: Path, text: Path, uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    recipe = make_recipe(text)
    start = load_student(pico_llama, recipe.nha, dtype=torch.float32, seed=recipe.seed).state_dict()
    trained = load_file(uninterrupted["folder"] / "stages/01-align/trained.safetensors")
    assert set(trained) == {name for name in start if ".nha." in name}
    assert all(not torch.equal(start[name], trained[name]) for name in trained)
    summary = json.loads((uninterrupted["folder"] / "stages/01-align/done.json").read_text())
    names = {"loss", "align/layer_00", "align/layer_01"}
    assert set(summary["first"]) == set(summary["last"]) == names
    assert all(summary["last"][name] < summary["first"][name] for name in names)
    assert summary["steps"] == 9 and summary["tokens"] == 9 * 96


def test_metrics_rows(uninterrupted: dict[str, Any]) -> None:
    lines = (uninterrupted["folder"] / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    align = [row for row in rows if row["stage"] == "01-align"]
    assert [row["step"] for row in align] == [1, 3, 6, 9]
    assert [row["tokens"] for row in align] == [96, 288, 576, 864]
    for row in align:
        assert row["loss"] == pytest.approx((row["align/layer_00"] + row["align/layer_01"]) / 2, abs=2e-6)
        assert row["seconds"] > 0
    assert align[0]["lr"] == 0 < align[-1]["lr"] < align[1]["lr"] == 0.02  # warmup of 2 steps, then a cosine
    distill = [row for row in rows if row["stage"] == "02-distill"]
    assert [row["step"] for row in distill] == [1, 3, 6, 8]
    assert {"kl", "ce", "lr", "gate_lr"} < set(distill[0])


def test_nothing_to_align_is_refused(pico_llama: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="every layer keeps full attention"):
        train(pico_llama, tmp_path, make_recipe(text, nha={"window": "full"}))
    assert not (tmp_path / "stages").exists()


def test_a_window_that_holds_the_whole_sequence_has_no_error(pico_llama: Path, text: Path, tmp_path: Path) -> None:
    recipe = make_recipe(text, nha={"window": 64, "slots": 4})
    recipe.stages = recipe.stages[:1]
    model, (summary,) = train(pico_llama, tmp_path, recipe)
    assert summary["last"]["loss"] < 1e-9  # squared rounding of fp32


def test_a_loss_that_is_not_a_number_names_stage_step_and_layer(
    pico_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = AlignTrainer.losses

    def losses(self: Any, *args: Any) -> Any:
        if self.state.global_step == 5:
            with torch.no_grad():
                self.layers[1][1].nha.gate_proj.weight[0, 0] = float("nan")
        return real(self, *args)

    monkeypatch.setattr(AlignTrainer, "losses", losses)
    with pytest.raises(WorkError, match=r"stage 01-align, step 6: the loss is not finite, worst in layer 1;"):
        train(pico_llama, tmp_path, make_recipe(text))
    assert [path.name for path in (tmp_path / "stages/01-align").iterdir()] == ["checkpoint-4"]
