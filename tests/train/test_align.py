"""The align stage: what its loss is, what it trains, what it spares, and its options."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from objectives_made import make, packed_batch, plain_batch, settings, step, student
from safetensors.torch import load_file
from stages import make_recipe, train

from nha_convert.convert import load_student
from nha_convert.errors import InputError
from nha_convert.modeling.attention_nha import nha_layers
from nha_convert.train.losses import row_errors
from nha_convert.train.objectives import make_objective


def layer_outputs(model: Any, input_ids: torch.Tensor, branch: str = "both") -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each layer's attention output [B, T, hidden] and its teacher's, from two plain calls with an ordinary graph."""
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
    found = []
    for layer, args, kwargs, wanted in calls:
        layer.nha_mode, layer.nha_branch = "student", branch
        found.append((layer(*args, **kwargs)[0], wanted))
        layer.nha_branch = "both"
    return found


def direct_errors(model: Any, input_ids: torch.Tensor, branch: str = "both") -> torch.Tensor:
    """[layers] mean over rows, straight from the definition."""
    return torch.stack(
        [
            torch.stack([(f - w).pow(2).sum() / w.pow(2).sum() for f, w in zip(found, wanted)]).mean()
            for found, wanted in layer_outputs(model, input_ids, branch)
        ]
    )


@pytest.mark.parametrize("memory_weight", [0.0, 0.5])
def test_loss_and_gradients_are_those_of_the_definition(pico: Path, memory_weight: float) -> None:
    objective = make(pico, "align", memory_weight=memory_weight)
    batch = plain_batch()
    loss, measured, gradients = step(objective, batch, [])
    direct = direct_errors(objective.model, batch["input_ids"])
    wanted_loss = direct.mean()
    names = {"align/layer_00", "align/layer_01"}
    if memory_weight:
        memory = direct_errors(objective.model, batch["input_ids"], "slots")
        wanted_loss = wanted_loss + memory_weight * memory.mean()
        direct = torch.cat([direct, memory])
        names |= {"memory/layer_00", "memory/layer_01"}
    learned = [tensor for group in objective.groups() for tensor in group["params"]]
    wanted = torch.autograd.grad(wanted_loss, learned)
    assert set(measured) == names
    # one formula summed in two orders in fp32
    found = torch.stack([measured[name] for name in sorted(names)])
    torch.testing.assert_close(found, direct.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(loss, wanted_loss.detach(), rtol=1e-5, atol=0)
    for mine, theirs in zip(gradients.values(), wanted):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6 * theirs.abs().max().item())


def test_tokens_that_attend_far_count_more(pico: Path) -> None:
    """At 1 the weights are the teacher's attention beyond the window; in between they are mixed with 1."""
    batch = plain_batch()
    whole = make(pico, "align", far_weight=1.0)
    found = layer_outputs(whole.model, batch["input_ids"])
    weights = []

    def note(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        weights.append(whole._weights(module, args, kwargs))

    layers = [layer for _, layer in nha_layers(whole.model)]
    handles = [layer.register_forward_hook(note, with_kwargs=True) for layer in layers]
    with torch.no_grad(), whole.teaching() as teacher:
        teacher(input_ids=batch["input_ids"], use_cache=False)
    for handle in handles:
        handle.remove()
    for share in (1.0, 0.5):
        loss, measured, _ = step(make(pico, "align", far_weight=share), batch, [])
        errors = []
        for (output, wanted), weight in zip(found, weights):
            weight = (1 - share + share * weight)[..., None]
            error = (weight * (output - wanted).pow(2)).sum((1, 2)) / (weight * wanted.pow(2)).sum((1, 2))
            errors.append(error.mean())
        torch.testing.assert_close(loss, torch.stack(errors).mean().detach(), rtol=1e-4, atol=0)
        plain = [measured["align/layer_00"], measured["align/layer_01"]]
        torch.testing.assert_close(torch.stack(plain), direct_errors(whole.model, batch["input_ids"]).detach())
    for weight in weights:
        torch.testing.assert_close(weight.mean(1), torch.ones(2))
        assert not weight[:, : 8 + 1].any(), "nothing lies beyond the window of the first tokens"


def test_far_weights_keep_documents_apart(pico_llama: Path) -> None:
    objective = make(pico_llama, "align", far_weight=1.0)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    plain = objective._weights

    def note(student: Any, args: Any, kwargs: Any) -> torch.Tensor:
        weight = plain(student, args, kwargs)
        seen.append((weight, kwargs["nha_cu_seqlens"]))
        return weight

    objective._weights = note
    step(objective, packed_batch(), [])
    assert len(seen) == 2
    for weight, ends in seen:
        for start in ends[:-1].tolist():
            assert not weight.flatten()[start : start + 5].any(), "a document's first tokens see nothing before it"
        torch.testing.assert_close(weight.mean(1), torch.ones(4))


def test_packed_documents_are_compared_as_if_alone(pico_llama: Path) -> None:
    objective = make(pico_llama, "align")
    batch = packed_batch()
    _, measured, _ = step(objective, batch, [])
    errors = torch.zeros(2, len(batch["input_ids"]))
    for row, (ids, positions) in enumerate(zip(batch["input_ids"], batch["position_ids"])):
        sums = torch.zeros(2, 2)
        lengths = torch.cat([(positions == 0).nonzero().flatten(), torch.tensor([48])]).diff()
        for document in ids.split(lengths.tolist()):
            for layer, (found, wanted) in enumerate(layer_outputs(objective.model, document[None])):
                sums[layer] += torch.stack([(found - wanted).pow(2).sum(), wanted.pow(2).sum()]).detach()
        errors[:, row] = sums[:, 0] / sums[:, 1]
    found = torch.stack([measured["align/layer_00"], measured["align/layer_01"]])
    torch.testing.assert_close(found, errors.mean(1), rtol=1e-4, atol=0)


def test_error_of_zeros_is_one_and_of_the_teacher_zero() -> None:
    wanted = torch.randn(3, 5, 7)
    assert row_errors(torch.zeros_like(wanted), wanted).tolist() == pytest.approx([1, 1, 1])
    assert row_errors(wanted, wanted).tolist() == [0, 0, 0]
    assert row_errors(2 * wanted, wanted).tolist() == pytest.approx([1, 1, 1])


def test_no_graph_for_the_backbone_and_no_logits(pico_llama: Path) -> None:
    objective = make(pico_llama, "align")

    def refuse(*_: Any) -> None:
        raise AssertionError("the head was called")

    objective.model.lm_head.register_forward_hook(refuse)
    seen: list[bool] = []
    for name, module in objective.model.named_modules():
        if name.endswith(("q_proj", "k_proj", "v_proj", "mlp")):
            module.register_forward_hook(lambda m, a, out: seen.append(out.requires_grad))
    step(objective, plain_batch(), [])
    assert seen and not any(seen)
    assert {name for name, tensor in objective.model.named_parameters() if tensor.grad is not None} == {
        name for name, _ in objective.model.named_parameters() if ".nha." in name
    }
    layers = [layer for _, layer in nha_layers(objective.model)]
    assert all(layer.nha_mode == "student" and layer.nha_branch == "both" for layer in layers)
    assert not any("forward" in vars(layer.q_proj) for layer in layers)


@pytest.mark.parametrize("part", ["lora", "qkvo"])
def test_projections_learn_too_and_the_teacher_stays(pico: Path, part: str) -> None:
    """A few steps bring the error down while what is compared with is the base model, whatever has been learned."""
    objective = make(pico, "align", train=["gates", part], own_teacher=part == "qkvo", learning_rate=3e-3)
    batch = plain_batch()
    targets = layer_outputs(student(pico), batch["input_ids"])
    optimizer = torch.optim.Adam(objective.groups())
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss, _ = objective(batch, objective.count(batch))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    seen: list[torch.Tensor] = []
    teacher = objective.model if objective.teacher is None else objective.teacher
    nha_layers(teacher)[0][1].register_forward_hook(lambda m, a, out: seen.append(out[0].detach()))
    objective(batch, 2)
    torch.testing.assert_close(seen[0], targets[0][1], rtol=0, atol=0)
    changed = objective.finish()
    assert any(name.endswith("q_proj.weight") for name in changed)
    assert set(changed) <= set(student(pico).state_dict())


def test_random_windows_depend_on_seed_and_step_alone(pico_llama: Path) -> None:
    objective = make(pico_llama, "align", random_windows=[2, 4, 8, 16])
    other = make_objective(student(pico_llama), settings("align", random_windows=[2, 4, 8, 16]), seed=6)
    batch = plain_batch()
    losses = {}

    def windows(one: Any, number: int) -> list[int]:
        one.begin_step(number)
        return list(one.model.config.nha_windows)

    drawn = [windows(objective, number) for number in range(12)]
    for number in (3, 4, 5):
        objective.begin_step(number)
        losses[tuple(drawn[number])] = objective(batch, 2)[0].item()
    assert [windows(objective, number) for number in reversed(range(12))] == drawn[::-1]
    assert {window for row in drawn for window in row} == {2, 4, 8, 16}
    assert any(first != second for first, second in drawn)
    assert [windows(other, number) for number in range(12)] != drawn
    assert len(set(losses.values())) == len(losses)
    objective.finish()
    assert objective.model.config.nha_windows == [8, 8]


def test_random_windows_are_cut_alike(pico_llama: Path) -> None:
    objective = make(pico_llama, "align", random_windows=[2, 4, 16])
    objective.begin_step(7)
    loss, _, _ = step(objective, packed_batch(), [])
    torch.testing.assert_close(step(objective, packed_batch(), [2])[0], loss, rtol=1e-5, atol=0)


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
    assert names <= set(summary["first"]) and names <= set(summary["last"])
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
    with pytest.raises(InputError, match="nothing to train, every layer"):
        train(pico_llama, tmp_path, make_recipe(text, nha={"window": "full"}))


def test_a_window_that_holds_the_whole_sequence_has_no_error(pico_llama: Path) -> None:
    objective = make(pico_llama, "align", nha={"window": 64, "slots": 4})
    loss, _, gradients = step(objective, plain_batch(), [])
    assert loss < 1e-9  # squared rounding of fp32
    assert len(gradients) == len(objective.groups()[0]["params"])


def test_the_worst_layer_is_the_one_that_is_not_a_number(pico_llama: Path) -> None:
    objective = make(pico_llama, "align")
    batch = plain_batch()
    _, measured = objective(batch, 2)
    errors = [measured["align/layer_00"], measured["align/layer_01"]]
    assert objective.worst_layer(batch) == errors.index(max(errors))
    for broken in (0, 1):
        objective = make(pico_llama, "align")
        with torch.no_grad():
            objective.layers[broken][1].nha.gate_proj.weight[0, 0] = float("nan")
        assert not torch.isfinite(objective(batch, 2)[0])
        assert objective.worst_layer(batch) == broken
