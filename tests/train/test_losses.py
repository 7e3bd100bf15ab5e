"""The parts of losses: their formulas, what is left out of them, and the memory that chunks spare."""

from typing import Any

import pytest
import torch
from loss_memory import measured

from nha_convert.train import losses
from nha_convert.train.losses import shifted_targets, token_errors, token_sums


def tokens(rows: int = 2, length: int = 5) -> tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A head of 13 tokens, student's and teacher's states, and targets with gaps."""
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 13, bias=False)
    student, teacher = torch.randn(2, rows, length, 8)
    labels = torch.randint(0, 13, (rows, length))
    labels[0, 3] = -100
    positions = torch.arange(length).repeat(rows, 1)
    return head, student, teacher, shifted_targets({"labels": labels, "position_ids": positions})


def test_targets() -> None:
    labels = torch.tensor([[5, 6, 7, 8, 9, 10], [1, -100, 3, 4, -100, 6]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]])
    wanted = [[6, 7, -100, 9, 10, -100], [-100, 3, 4, -100, 6, -100]]
    assert shifted_targets({"labels": labels, "position_ids": positions}).tolist() == wanted
    alone = shifted_targets({"labels": labels})
    assert alone.tolist() == [[6, 7, 8, 9, 10, -100], wanted[1]]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_against_the_formulas_in_double(temperature: float) -> None:
    head, student, teacher, targets = tokens()
    functions = {"kl": temperature, "reverse_kl": temperature, "ce": 1.0}
    found = token_sums(head, student, teacher, targets, functions)
    weight = head.weight.double()
    log_p = torch.log_softmax(teacher.double() @ weight.T / temperature, -1)
    log_q = torch.log_softmax(student.double() @ weight.T / temperature, -1)
    text = torch.log_softmax(student.double() @ weight.T, -1)
    places = [(b, t) for b in range(2) for t in range(5) if targets[b, t] >= 0]
    assert len(places) == 7
    wanted = {
        "kl": sum((log_p.exp() * (log_p - log_q))[place].sum() for place in places) * temperature**2,
        "reverse_kl": sum((log_q.exp() * (log_q - log_p))[place].sum() for place in places) * temperature**2,
        "ce": -sum(text[place][targets[place]] for place in places),
    }
    for name, value in wanted.items():
        assert found[name].item() == pytest.approx(torch.as_tensor(value).item(), rel=1e-5)


@pytest.mark.parametrize("functions", [{"kl": 1.5, "ce": 1.0}, {"ce": 1.0}, {"reverse_kl": 1.0, "kl": 1.0}])
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, functions: dict[str, float]) -> None:
    head, student, teacher, targets = tokens(3, 9)
    calls: list[int] = []
    head.register_forward_hook(lambda module, args, output: calls.append(len(output)))
    results = []
    for size in (1 << 20, 4 * 13):
        monkeypatch.setattr(losses, "CHUNK", size)
        calls.clear()
        mine = student.clone().requires_grad_(True)
        sums = token_sums(head, mine, teacher if len(functions) > 1 else None, targets, functions)
        weights = torch.autograd.grad(torch.stack(list(sums.values())).sum(), (mine, head.weight))
        results.append((torch.stack(list(sums.values())).detach(), *weights))
        assert max(calls) == (23 if size > 100 else 4)
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)  # sums in another order


def test_no_label_gives_zero_with_a_graph() -> None:
    head, student, teacher, targets = tokens()
    student.requires_grad_(True)
    sums = token_sums(head, student, teacher, torch.full_like(targets, -100), {"kl": 1.0, "ce": 1.0})
    assert [value.item() for value in sums.values()] == [0, 0]
    torch.stack(list(sums.values())).sum().backward()
    assert student.grad is not None and not student.grad.any()


def test_a_function_that_compares_needs_a_teacher() -> None:
    head, student, _, targets = tokens()
    with pytest.raises(ValueError, match="kl compares with a teacher"):
        token_sums(head, student, None, targets, {"kl": 1.0})


def test_token_errors_weigh_tokens_alike() -> None:
    wanted = torch.randn(2, 4, 6) * torch.tensor([1000.0, 1, 1, 1])[:, None]
    assert torch.allclose(token_errors(1.5 * wanted, wanted), torch.full((2, 4), 0.25))


def test_memory_of_whole_logits_is_not_taken() -> None:
    """At a vocabulary of 65,536 and 2,048 tokens; the acceptance line measures 151,936 and 4,096."""
    whole = measured(0, 65_536, 2048, 32)
    chunked = measured(1 << 22, 65_536, 2048, 32)
    assert whole["extra_bytes"] > 3 * 65_536 * 2048 * 4  # it does take them
    assert chunked["extra_bytes"] <= 0.1 * whole["extra_bytes"]
    assert chunked["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert chunked["gradient_norm"] == pytest.approx(whole["gradient_norm"], rel=1e-5)
