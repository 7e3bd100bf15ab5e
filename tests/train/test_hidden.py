"""The hidden stage: states after every block, on the student's own inputs, without the head."""

from pathlib import Path
from typing import Any

import torch
from objectives_made import make, packed_batch, plain_batch, step
from stages import make_recipe, train
from transformers import AutoModelForCausalLM


def test_loss_is_that_of_the_definition(pico: Path) -> None:
    objective = make(pico, "hidden")
    batch = plain_batch()

    def refuse(*_: Any) -> None:
        raise AssertionError("the head was called")

    handle = objective.model.lm_head.register_forward_hook(refuse)
    loss, measured, _ = step(objective, batch, [])
    handle.remove()
    base = AutoModelForCausalLM.from_pretrained(pico, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = base.model(batch["input_ids"], output_hidden_states=True).hidden_states
        mine = objective.model.eval().model(batch["input_ids"], output_hidden_states=True, use_cache=False)
    # the last of these lies behind the last norm, so the first block alone can be read here
    found, wanted = mine.hidden_states[1][:, :-1], theirs[1][:, :-1]
    first = ((found - wanted).pow(2).sum(-1) / wanted.pow(2).sum(-1)).mean()
    blocks: list[torch.Tensor] = []
    with torch.no_grad():
        for model in (objective.model, base):
            keep = model.model.layers[1].register_forward_hook(lambda m, a, out: blocks.append(out))
            model.model(batch["input_ids"], use_cache=False)
            keep.remove()
    found, wanted = (out[0] if isinstance(out, tuple) else out for out in blocks)
    ratios = (found - wanted).pow(2).sum(-1) / wanted.pow(2).sum(-1)
    second = ratios[:, :-1].mean()
    torch.testing.assert_close(loss, (first + second) / 2, rtol=1e-4, atol=0)
    assert set(measured) == {"hidden"} and measured["hidden"] == loss


def test_all_but_head_and_last_norm_learn(pico: Path) -> None:
    objective = make(pico, "hidden", train=["gates", "all"], own_teacher=True)
    step(objective, packed_batch(), [])
    learned = {name for name, tensor in objective.model.named_parameters() if tensor.requires_grad}
    named = {name for name, _ in objective.model.named_parameters()}
    assert named - learned <= {"lm_head.weight", "model.norm.weight"}
    assert "model.norm.weight" not in learned
    assert all(objective.model.get_parameter(name).grad is not None for name in learned)


def test_it_learns_and_a_distill_stage_can_follow(pico_llama: Path, text: Path, tmp_path: Path) -> None:
    """Adapters merged by one stage, the next compares with the base model all the same."""
    common = {"sequence_length": 48, "batch_size": 2, "save_steps": 50, "lora": {"rank": 4, "alpha": 8}}
    stages = [
        {"kind": "hidden", "tokens": 20 * 96, "learning_rate": 0.005, **common},
        {"kind": "distill", "tokens": 3 * 96, "learning_rate": 1e-5, "gate_learning_rate": 1e-5, **common},
    ]
    recipe = make_recipe(text, stages=stages)
    assert [recipe.needs_teacher(index) for index in (0, 1)] == [False, True]
    _, summaries = train(pico_llama, tmp_path, recipe)
    assert summaries[0]["last"]["hidden"] < summaries[0]["first"]["hidden"]
    assert summaries[1]["first"]["kl"] > 0.01
