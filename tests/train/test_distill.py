"""The distill stage: its losses, its teacher, and the merge that ends it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stages import make_recipe, train

from nha_convert.convert import load_student
from nha_convert.errors import WorkError
from nha_convert.train import distill
from nha_convert.train.distill import DistillTrainer, token_losses
from nha_convert.train.job import StageJob


def make_trainer(teacher: Path, recipe: Any, run_dir: Path) -> DistillTrainer:
    model = load_student(teacher, recipe.nha, dtype=torch.float32, seed=recipe.seed)
    return DistillTrainer(model, StageJob(recipe, 1, run_dir, quiet=True), [])


def scramble(trainer: DistillTrainer) -> None:
    """Adapters that do something: the second matrix starts at zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, tensor in trainer.model.named_parameters():
            if ".lora_B." in name:
                tensor.normal_(std=0.2)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_losses_against_the_formula_in_double(temperature: float) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 13, bias=False)
    student, teacher = torch.randn(2, 2, 5, 8)
    labels = torch.randint(0, 13, (2, 5))
    labels[0, 3] = -100
    divergence, entropy = token_losses(head, student, teacher, labels, temperature)
    weight = head.weight.double()
    log_student = torch.log_softmax(student.double() @ weight.T, -1)
    p = torch.softmax(teacher.double() @ weight.T / temperature, -1)
    log_q = torch.log_softmax(student.double() @ weight.T / temperature, -1)
    wanted = (p * (p.log() - log_q)).sum(-1).mean() * temperature**2
    picked = [-log_student[b, t, labels[b, t + 1]] for b in range(2) for t in range(4) if labels[b, t + 1] != -100]
    assert divergence.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert entropy.item() == pytest.approx(torch.stack(picked).mean().item(), rel=1e-5)
    assert len(picked) == 7


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 16, bias=False)
    labels = torch.randint(0, 16, (2, 9))
    teacher = torch.randn(2, 9, 8)
    results = []
    for size in (1 << 20, 5 * 16):
        monkeypatch.setattr(distill, "CHUNK", size)
        torch.manual_seed(1)
        student = torch.randn(2, 9, 8, requires_grad=True)
        losses = torch.stack(token_losses(head, student, teacher, labels, 1.5))
        results.append((losses.detach(), *torch.autograd.grad(losses[0] + 0.3 * losses[1], student)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-7)  # sums in another order


def test_the_teacher_is_the_base_model_whatever_the_adapters(pico: Path, text: Path, tmp_path: Path) -> None:
    """The hidden states that enter the loss as the teacher's are the untouched model's, bit for bit."""
    from transformers import AutoModelForCausalLM

    trainer = make_trainer(pico, make_recipe(text), tmp_path)
    scramble(trainer)
    input_ids = torch.randint(0, 256, (2, 48))
    seen: list[torch.Tensor] = []
    trainer.decoder.register_forward_hook(lambda m, a, out: seen.append(out.last_hidden_state.detach()))
    loss, _ = trainer.losses(input_ids, input_ids)
    base = AutoModelForCausalLM.from_pretrained(pico, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = base.model(input_ids=input_ids).last_hidden_state
    assert len(seen) == 2
    assert torch.equal(seen[0], wanted)
    assert not torch.allclose(seen[1], wanted, atol=1e-2)
    loss.backward()
    without = [
        name for name, tensor in trainer.model.named_parameters() if tensor.requires_grad and tensor.grad is None
    ]
    assert without == []
    assert all((".lora_" in n or ".nha." in n) == t.requires_grad for n, t in trainer.model.named_parameters())


def test_merging_changes_no_logit(pico: Path, text: Path, tmp_path: Path) -> None:
    trainer = make_trainer(pico, make_recipe(text), tmp_path)
    scramble(trainer)
    trainer.model.eval()
    input_ids = torch.randint(0, 256, (2, 48))
    with torch.no_grad():
        before = trainer.model(input_ids=input_ids).logits
        tensors = trainer.merge()
        after = trainer.model(input_ids=input_ids).logits
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4 * before.abs().max().item())  # W x + B A x in fp32
    assert not any("lora" in name for name in trainer.model.state_dict())
    assert set(tensors) <= set(trainer.model.state_dict())


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
    """Twenty steps on two windows' worth of text bring the student closer to its teacher."""
    recipe = make_recipe(text)
    recipe.stages = [recipe.stages[1].model_copy(update={"tokens": 20 * 96, "ce_weight": 0.0})]
    _, (summary,) = train(pico_llama, tmp_path, recipe)
    assert summary["last"]["kl"] < 0.8 * summary["first"]["kl"]


def test_no_stage_after_distill(text: Path) -> None:
    recipe = make_recipe(text)
    with pytest.raises(ValueError, match="let it be the last stage"):
        recipe.stages = recipe.stages[1:] + recipe.stages[:1]


def test_a_loss_that_is_not_a_number_names_the_layer(
    pico_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = DistillTrainer.losses

    def losses(self: Any, *args: Any) -> Any:
        if self.state.global_step == 2:
            with torch.no_grad():
                self.model.get_parameter("model.layers.1.self_attn.v_proj.lora_B.default.weight").fill_(float("inf"))
        return real(self, *args)

    monkeypatch.setattr(DistillTrainer, "losses", losses)
    recipe = make_recipe(text)
    recipe.stages = recipe.stages[1:]
    with pytest.raises(WorkError, match=r"stage 01-distill, step 3: the loss is not finite, worst in layer 1;"):
        train(pico_llama, tmp_path, recipe)
