"""NLL by position and agreement with the teacher, against plain computations."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from nha_convert.convert import load_student
from nha_convert.evaluate.nll import (
    agreement,
    compare,
    default_batch_size,
    eval_windows,
    nll_by_position,
    position_buckets,
)
from nha_convert.settings import NHASettings

TOKENS = torch.arange(100) * 37 % 251
SMALL = NHASettings(window=6, slots=8, sinks=2)


def test_position_buckets() -> None:
    assert position_buckets(100) == [(0, 16), (16, 32), (32, 64), (64, 100)]
    assert position_buckets(64) == [(0, 16), (16, 32), (32, 64)]
    assert position_buckets(8) == [(0, 8)]


@pytest.mark.parametrize("count", [2, 9, 32, 33, 100])
@pytest.mark.parametrize("bos", [None, 256])
def test_every_token_is_predicted_once(count: int, bos: int | None) -> None:
    tokens = torch.arange(count)
    batches = list(eval_windows(tokens, 9, bos, 3))
    predicted = torch.cat([batch[:, 1:].reshape(-1) for batch in batches])
    assert predicted.tolist() == tokens[(bos is None) :].tolist()
    for batch in batches:
        assert batch.shape[0] <= 3 and batch.shape[1] <= 9
        if bos is None:  # neighbours in the text are neighbours in the window
            assert (batch[:, 1:] - batch[:, :-1] == 1).all()
        else:
            assert (batch[:, 0] == bos).all()


@pytest.mark.parametrize(("count", "length"), [(1, 8), (20, 1)])
def test_nothing_to_predict(count: int, length: int) -> None:
    with pytest.raises(ValueError, match="nothing to predict"):
        list(eval_windows(torch.arange(count), length, None, 1))


@torch.no_grad()
def test_one_window_is_the_loss_of_transformers(pico: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(pico)
    ids = torch.cat((torch.tensor([256]), TOKENS))
    expected = model(ids[None], labels=ids[None]).loss.item()
    assert nll_by_position(model, TOKENS, 101, bos=256)["mean"] == pytest.approx(expected, rel=1e-6)
    assert nll_by_position(model, ids, 101)["mean"] == pytest.approx(expected, rel=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 2, None])
def test_buckets_hold_the_loss_of_their_positions(pico_llama: Path, batch_size: int | None) -> None:
    model = load_student(pico_llama, SMALL)
    losses: dict[int, list[float]] = {}
    for start in range(0, 100, 39):  # windows of 40 with BOS; the last is shorter
        ids = torch.cat((torch.tensor([256]), TOKENS[start : start + 39]))[None]
        log_p = model(ids).logits.log_softmax(-1)
        for position in range(1, ids.shape[1]):
            losses.setdefault(position, []).append(-log_p[0, position - 1, ids[0, position]].item())
    result = nll_by_position(model, TOKENS, 40, [(0, 5), (5, 30), (30, 40)], batch_size, bos=256)
    assert sum(map(len, losses.values())) == 100
    for bucket, value in result["buckets"].items():
        start, end = map(int, bucket.split("-"))
        inside = [loss for position in range(start, end) for loss in losses.get(position, [])]
        assert value == pytest.approx(sum(inside) / len(inside), rel=1e-5)
    everything = [loss for values in losses.values() for loss in values]
    assert result["mean"] == pytest.approx(sum(everything) / 100, rel=1e-5)
    assert len(result["buckets"]) == 3


def test_compare_of_known_distributions() -> None:
    """A uniform reader over 4 symbols against one that gives the first symbol 1/2 and the others 1/6."""
    uniform = torch.zeros(4)
    skewed = torch.tensor([1 / 2, 1 / 6, 1 / 6, 1 / 6]).log()
    readers = {
        "q": lambda ids: skewed.expand(*ids.shape, 4),
        "p": lambda ids: uniform.expand(*ids.shape, 4),
        "other": lambda ids: (skewed.roll(1)).expand(*ids.shape, 4),
    }
    tokens = torch.tensor([0, 0, 1, 0, 2])  # predicted: 0 1 0 2
    result = compare(readers, tokens, 5, reference="q", quiet=True)
    assert result["p"]["nll"]["mean"] == pytest.approx(math.log(4))
    assert result["q"]["nll"]["mean"] == pytest.approx((2 * math.log(2) + 2 * math.log(6)) / 4)
    assert result["p"]["kl"]["mean"] == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(4 / 6), rel=1e-5)
    assert result["other"]["top1"]["mean"] == 0 and result["p"]["tokens"] == 4
    assert "kl" not in result["q"]


def test_agreement_by_position() -> None:
    """A reader that is the reference but where one token precedes the predicted one, or at least 300 do."""
    skewed = torch.tensor([1 / 2, 1 / 6, 1 / 6, 1 / 6]).log()

    def differs(ids: torch.Tensor) -> torch.Tensor:
        logits = skewed.repeat(*ids.shape, 1)
        logits[:, 0] = logits[:, 299:] = skewed.roll(1)
        return logits

    tokens = torch.zeros(2 * 399 + 1, dtype=torch.long)  # two windows, longer than the positions scored at once
    readers = {"reference": lambda ids: skewed.expand(*ids.shape, 4), "other": differs}
    buckets = [(0, 2), (2, 256), (256, 300), (300, 400)]
    other = compare(readers, tokens, 400, reference="reference", buckets=buckets, batch_size=2, quiet=True)["other"]
    kl = (1 / 2 - 1 / 6) * math.log(3)
    assert list(other["kl"]["buckets"].values()) == pytest.approx([kl, 0, 0, kl], abs=1e-7)
    assert list(other["top1"]["buckets"].values()) == [0, 1, 1, 0]


def test_agreement_of_a_student_with_nothing_absorbed_is_complete(pico: Path) -> None:
    model = load_student(pico, NHASettings(window=64, slots=8))
    result = agreement(model, TOKENS, 50, bos=256)
    assert result["top1"]["mean"] == 1
    assert abs(result["kl"]["mean"]) < 1e-6  # rounding of two fp32 attention implementations


@torch.no_grad()
def test_agreement_with_a_teacher_of_its_own(pico_llama: Path) -> None:
    student, teacher = load_student(pico_llama, SMALL), AutoModelForCausalLM.from_pretrained(pico_llama)
    before = agreement(student, TOKENS, 50, bos=256)
    assert before["kl"]["mean"] > 1e-3
    apart = agreement(student, TOKENS, 50, bos=256, teacher=teacher)
    assert apart["kl"]["mean"] == pytest.approx(before["kl"]["mean"], rel=1e-5)
    for layer in student.model.layers:  # what merging an adapter does: the backbone is no longer the teacher's
        layer.self_attn.v_proj.weight.mul_(1.5)
    ids = torch.cat((torch.tensor([256]), TOKENS[:49]))[None]
    log_q, log_p = teacher(ids).logits[0, :-1].log_softmax(-1), student(ids).logits[0, :-1].log_softmax(-1)
    after = agreement(student, TOKENS[:49], 50, bos=256, teacher=teacher)
    assert after["kl"]["mean"] == pytest.approx((log_q.exp() * (log_q - log_p)).sum(-1).mean().item(), rel=1e-5)
    assert after["top1"]["mean"] == pytest.approx((log_q.argmax(-1) == log_p.argmax(-1)).double().mean().item())
    assert after["kl"]["mean"] != pytest.approx(agreement(student, TOKENS[:49], 50, bos=256)["kl"]["mean"], rel=1e-3)


def test_modes_come_back_and_nothing_is_printed(pico_llama: Path, capsys: Any) -> None:
    model = load_student(pico_llama, SMALL).train()
    capsys.readouterr()
    agreement(model, TOKENS, 50)
    assert model.training and all(layer.self_attn.nha_mode == "student" for layer in model.model.layers)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert capsys.readouterr() == ("", "")


def test_batch_size_follows_the_vocabulary(pico_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(pico_llama)
    assert default_batch_size(model, 64) == 16
    model.config.vocab_size = 2**17
    assert default_batch_size(model, 256) == 2
    assert default_batch_size(model, 4096) == 1
