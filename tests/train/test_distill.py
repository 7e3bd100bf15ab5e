"""The distill stage: its list of losses, its teacher, and the merge that ends it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from objectives_made import make, packed_batch, plain_batch, scramble, settings, step, student
from safetensors.torch import load_file
from stages import make_recipe, train
from transformers import AutoModelForCausalLM, AutoTokenizer

from nha_convert.convert import load_student
from nha_convert.train.objectives import make_objective

EVERY: list[dict[str, Any]] = [
    {"function": "kl", "weight": 0.7, "temperature": 2.0},
    {"function": "reverse_kl", "weight": 0.5},
    {"function": "ce", "weight": 0.2},
    {"function": "hidden", "weight": 0.3},
    {"function": "attention", "weight": 0.4},
]


def outputs(model: Any, input_ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Logits, states after every block, and attention outputs of a plain forward pass."""
    blocks: list[torch.Tensor] = []
    attentions: list[torch.Tensor] = []
    handles = [layer.register_forward_hook(lambda m, a, out: blocks.append(out)) for layer in model.model.layers]
    handles += [
        layer.self_attn.register_forward_hook(lambda m, a, out: attentions.append(out[0]))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        logits = model(input_ids=input_ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits, [out[0] if isinstance(out, tuple) else out for out in blocks], attentions


def test_every_loss_is_measured_and_weighed(pico: Path) -> None:
    """Against the formulas, from plain forward passes of base model and student."""
    objective = make(pico, "distill", losses=EVERY)
    batch = plain_batch()
    loss, measured, _ = step(objective, batch, [])
    base = AutoModelForCausalLM.from_pretrained(pico, dtype=torch.float32).eval()
    theirs, their_blocks, their_attentions = outputs(base, batch["input_ids"])
    mine, my_blocks, my_attentions = outputs(objective.model.eval(), batch["input_ids"])

    def divergence(p: torch.Tensor, q: torch.Tensor, t: float) -> torch.Tensor:
        p, q = (torch.log_softmax(x[:, :-1].double() / t, -1) for x in (p, q))
        return (p.exp() * (p - q)).sum(-1).mean() * t**2

    def ratio(found: torch.Tensor, given: torch.Tensor, *dims: int) -> torch.Tensor:
        found, given = found[:, :-1], given[:, :-1]
        return ((found - given).pow(2).sum(dims) / given.pow(2).sum(dims)).mean()

    blocks, attentions = zip(my_blocks, their_blocks), zip(my_attentions, their_attentions)
    wanted = {
        "kl": divergence(theirs, mine, 2.0),
        "reverse_kl": divergence(mine, theirs, 1.0),
        "ce": torch.nn.functional.cross_entropy(mine[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten()),
        "hidden": torch.stack([ratio(a, b, -1) for a, b in blocks]).mean(),
        "attention": torch.stack([ratio(a, b, 1, 2) for a, b in attentions]).mean(),
    }
    assert set(measured) == set(wanted)
    for name, value in wanted.items():
        assert measured[name].item() == pytest.approx(value.item(), rel=1e-4), name
    weighed = sum(float(term["weight"]) * wanted[str(term["function"])].item() for term in EVERY)
    assert loss.item() == pytest.approx(weighed, rel=1e-4)


def test_the_teacher_is_the_base_model_whatever_the_adapters(pico: Path) -> None:
    """The hidden states that enter the loss as the teacher's are the untouched model's, bit for bit."""
    objective = make(pico, "distill")
    batch = plain_batch()
    seen: list[torch.Tensor] = []
    objective.model.model.register_forward_hook(lambda m, a, out: seen.append(out.last_hidden_state.detach()))
    step(objective, batch, [])
    base = AutoModelForCausalLM.from_pretrained(pico, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = base.model(input_ids=batch["input_ids"]).last_hidden_state
    assert len(seen) == 2
    assert torch.equal(seen[0], wanted)
    assert not torch.allclose(seen[1], wanted, atol=1e-2)
    parameters = dict(objective.model.named_parameters())
    assert all(tensor.grad is not None for tensor in parameters.values() if tensor.requires_grad)
    assert all((".lora_" in name or ".nha." in name) == t.requires_grad for name, t in parameters.items())


def test_a_teacher_of_its_own_stays_while_the_student_changes(pico: Path) -> None:
    objective = make(pico, "distill", train=["gates", "all"], own_teacher=True)
    assert objective.teacher is not None
    batch = packed_batch()
    seen: list[torch.Tensor] = []
    objective.teacher.model.register_forward_hook(lambda m, a, out: seen.append(out.last_hidden_state))
    step(objective, batch, [])
    with torch.no_grad():
        for group in objective.groups():
            for tensor in group["params"]:
                tensor.add_(0.1 * torch.randn_like(tensor))
    step(objective, batch, [])
    assert torch.equal(seen[0], seen[1])
    base = AutoModelForCausalLM.from_pretrained(pico, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = base.model(input_ids=batch["input_ids"][:1]).last_hidden_state
    torch.testing.assert_close(seen[0][:1], wanted, rtol=1e-4, atol=1e-5)


def test_checkpointed_layers_give_the_same_gradients(pico: Path) -> None:
    """Also where losses read what is inside the layers, which run again in the backward pass."""
    results = []
    for checkpointed in (False, True):
        objective = make(pico, "distill", losses=EVERY)
        objective.train()
        if checkpointed:
            model = objective.model
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
            assert all(layer.gradient_checkpointing for layer in model.model.layers)
        results.append(step(objective, packed_batch(), []))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=0)
    for name, gradient in results[0][2].items():
        assert (results[1][2][name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_16_bit_products_on_32_bit_weights(pico: Path) -> None:
    exact = step(make(pico, "distill"), plain_batch(), [])
    objective = make(pico, "distill", precision="bfloat16")
    seen: list[torch.dtype] = []
    objective.model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda m, a, out: seen.append(out.dtype))
    loss, _, gradients = step(objective, plain_batch(), [])
    assert seen and set(seen) == {torch.bfloat16}
    assert loss.dtype == torch.float32 and all(gradient.dtype == torch.float32 for gradient in gradients.values())
    torch.testing.assert_close(loss, exact[0], rtol=0.05, atol=0)
    assert loss != exact[0]


def test_merging_changes_no_logit(pico: Path) -> None:
    objective = make(pico, "distill")
    objective.model.eval()
    input_ids = plain_batch()["input_ids"]
    with torch.no_grad():
        before = objective.model(input_ids=input_ids).logits
        tensors = objective.finish()
        after = objective.model(input_ids=input_ids).logits
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4 * before.abs().max().item())  # W x + B A x in fp32
    assert not any("lora" in name for name in objective.model.state_dict())
    assert set(tensors) <= set(objective.model.state_dict())


def test_the_windows_of_a_stage_are_set_and_taken_back(pico_llama: Path) -> None:
    model = student(pico_llama)
    objective = make_objective(model, settings("distill", windows=[16, "full"]), seed=5)
    scramble(model)
    assert model.config.nha_windows == [16, "full"]
    first = objective(plain_batch(), 10)[0]
    changed = objective.finish()
    assert model.config.nha_windows == [8, 8]
    assert first.item() > 0
    gates = {name for name in changed if ".nha." in name}
    assert gates and all("layers.0." in name for name in gates)  # layer 1 ran no gates


def test_the_file_makes_a_fresh_student_the_trained_one(
    pico_llama: Path, text: Path, uninterrupted: dict[str, Any]
) -> None:
    recipe = make_recipe(text)
    fresh = load_student(pico_llama, recipe.nha, dtype=torch.float32, seed=recipe.seed).state_dict()
    trained = load_file(uninterrupted["folder"] / "stages/02-distill/trained.safetensors")
    projections = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")
    assert set(trained) == {name for name in fresh if ".nha." in name or name.endswith(projections)}
    assert all(not torch.equal(fresh[name], trained[name]) for name in trained)
    final = uninterrupted["tensors"]
    assert all(torch.equal(final[name], trained.get(name, fresh[name])) for name in fresh)


def test_it_learns(pico_llama: Path, text: Path, tmp_path: Path) -> None:
    """Twenty steps bring the student closer to its teacher, on the same windows of text before and after."""
    recipe = make_recipe(text)
    stage = {**recipe.stages[1].model_dump(), "tokens": 20 * 96, "losses": [{"function": "kl"}]}
    recipe = make_recipe(text, stages=[stage])
    ids = AutoTokenizer.from_pretrained(pico_llama)(text.read_text())["input_ids"]
    input_ids = torch.tensor(ids[: 32 * 48]).view(32, 48)
    batch = {"input_ids": input_ids, "labels": input_ids, "position_ids": torch.arange(48).repeat(32, 1)}

    def divergence(model: Any) -> float:
        only = settings("distill", losses=[{"function": "kl"}], train=["gates"])
        objective = make_objective(model, only, teacher=student(pico_llama))
        with torch.no_grad():
            return objective(batch, objective.count(batch))[0].item()

    before = divergence(load_student(pico_llama, recipe.nha, dtype=torch.float32, seed=recipe.seed))
    model, (summary,) = train(pico_llama, tmp_path, recipe)
    assert divergence(model) < 0.85 * before
    assert set(summary["last"]) >= {"loss", "kl"} and "ce" not in summary["last"]


def test_random_windows_of_the_whole_model(pico_llama: Path) -> None:
    objective = make(pico_llama, "distill", random_windows=[2, 4, 16])
    batch = plain_batch()
    losses = {}
    for number in range(6):
        objective.begin_step(number)
        windows = tuple(objective.model.config.nha_windows)
        assert set(windows) <= {2, 4, 16}
        losses.setdefault(windows, set()).add(objective(batch, 100)[0].item())
    assert len(losses) > 2 and all(len(values) == 1 for values in losses.values())
    objective.finish()
    assert objective.model.config.nha_windows == [8, 8]
