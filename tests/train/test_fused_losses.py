"""Liger-Kernel's losses against ours, its kernels in Triton's interpreter; a GPU is the only place that takes them."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nha_convert.train import fused_losses, losses

ROOT = Path(__file__).resolve().parents[2]
COMPARE = """
import json, sys
import torch
from nha_convert.train import losses
from nha_convert.train.fused_losses import fused_sums

torch.manual_seed(0)
head = torch.nn.Linear(24, 77, bias=False)
student, teacher = torch.randn(2, 2, 9, 24)
student.requires_grad_()
targets = torch.randint(0, 77, (2, 9))
targets[0, 3:5] = -100
targets[1, -1] = -100
found = {}
for functions in ({"ce": 1.0}, {"kl": 1.0, "ce": 1.0}, {"kl": 2.5, "reverse_kl": 1.5}):
    results = []
    for fuse in (False, True):
        losses.can_fuse = lambda *_, fuse=fuse: fuse
        sums = losses.token_sums(head, student, teacher, targets, functions)
        total = sum(0.3 * (place + 1) * value for place, value in enumerate(sums.values())) / 7
        results.append([*sums.values(), *torch.autograd.grad(total, (student, head.weight))])
    found["+".join(functions)] = [((a - b).norm() / a.norm()).item() for a, b in zip(*results)]
print(json.dumps(found))
"""


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="Liger-Kernel is not installed")
def test_as_ours() -> None:
    """Values and gradients of states and head, relative; targets with gaps, temperatures, weights."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), f"{ROOT}/kernels"])}
    done = subprocess.run([sys.executable, "-c", COMPARE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    assert [len(values) for values in found.values()] == [3, 4, 4]
    assert all(value <= 2e-6 for values in found.values() for value in values), found


def test_taken_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    head = torch.nn.Linear(4, 7, bias=False)

    class Rows:
        device: Any = SimpleNamespace(type="cuda")

        def __len__(self) -> int:
            return 3

    rows: Any = Rows()
    monkeypatch.setattr(fused_losses, "_installed", lambda: True)
    assert fused_losses.can_fuse(head, rows)
    assert not fused_losses.can_fuse(head, torch.zeros(3, 4))
    assert not fused_losses.can_fuse(torch.nn.Linear(4, 7), rows)  # a head with a bias
    monkeypatch.setattr(fused_losses, "_installed", lambda: False)
    assert not fused_losses.can_fuse(head, rows)


def test_token_sums_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only predicted tokens are handed over."""
    seen: dict[str, Any] = {}

    def fused(head: Any, student: Any, teacher: Any, wanted: Any, functions: Any) -> dict[str, torch.Tensor]:
        seen.update(rows=len(student), wanted=wanted.tolist())
        return {"ce": torch.zeros(())}

    monkeypatch.setattr(losses, "can_fuse", lambda *_: True)
    monkeypatch.setattr(losses, "fused_sums", fused)
    targets = torch.tensor([[3, -100, 5]])
    assert losses.token_sums(torch.nn.Linear(4, 7), torch.randn(1, 3, 4), None, targets, {"ce": 1.0})["ce"] == 0
    assert seen == {"rows": 2, "wanted": [3, 5]}
