"""The finetune stage: cross entropy to the text alone, also at long context."""

from pathlib import Path
from typing import Any

import pytest
import torch
from objectives_made import make, packed_batch, plain_batch, step
from stages import make_recipe, train


def test_loss_is_the_cross_entropy_of_the_text_and_no_teacher_runs(pico: Path) -> None:
    objective = make(pico, "finetune")
    batch = plain_batch()
    passes: list[Any] = []
    objective.model.model.register_forward_hook(lambda m, a, out: passes.append(out))
    loss, measured, _ = step(objective, batch, [])
    assert len(passes) == 1
    with torch.no_grad():
        logits = objective.model.eval()(batch["input_ids"], use_cache=False).logits
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)
    assert set(measured) == {"ce"}


def test_only_labelled_tokens_of_the_same_document_count(pico_llama: Path) -> None:
    """Row by row against plain passes of each document alone."""
    objective = make(pico_llama, "finetune")
    batch = packed_batch()
    loss, _, _ = step(objective, batch, [])
    total, count = 0.0, 0
    model = objective.model.eval()
    for ids, labels, positions in zip(*(batch[name] for name in ("input_ids", "labels", "position_ids"))):
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        for start, end in zip(starts, starts[1:]):
            with torch.no_grad():
                logits = model(ids[None, start:end], use_cache=False).logits[0]
            wanted = labels[start:end][1:]
            losses = torch.nn.functional.cross_entropy(logits[:-1], wanted, reduction="none", ignore_index=-100)
            total, count = total + losses.sum().item(), count + int((wanted >= 0).sum())
    assert count == objective.count(batch)
    assert loss.item() == pytest.approx(total / count, rel=1e-5)


def test_it_learns_at_a_longer_context_than_the_stage_before(pico_llama: Path, text: Path, tmp_path: Path) -> None:
    common = {"batch_size": 2, "save_steps": 50, "train": "all", "learning_rate": 0.002}
    stages = [
        {"kind": "finetune", "name": "short", "tokens": 10 * 96, "sequence_length": 48, **common},
        {"kind": "finetune", "name": "long", "tokens": 10 * 512, "sequence_length": 256, **common, "windows": 16},
    ]
    model, (short, long) = train(pico_llama, tmp_path, make_recipe(text, stages=stages))
    assert short["last"]["ce"] < short["first"]["ce"]
    assert long["last"]["ce"] < long["first"]["ce"] < short["first"]["ce"]
    assert model.config.nha_windows == [8, 8]
