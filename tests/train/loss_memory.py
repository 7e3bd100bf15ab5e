"""Peak memory that KL + CE need beyond their inputs; run as a script, so that nothing else counts.

    python loss_memory.py LOGITS_PER_CHUNK VOCABULARY TOKENS HIDDEN

prints {"extra_bytes", "loss", "gradient_norm", "seconds"} as JSON. LOGITS_PER_CHUNK 0 takes the whole batch at once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def peak_and_present() -> tuple[int, int]:
    """VmHWM and VmRSS of this process in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmHWM", "VmRSS"))}
    return found["VmHWM"], found["VmRSS"]


def measure(chunk: int, vocabulary: int, tokens: int, hidden: int) -> dict[str, Any]:
    """One loss and its gradient in this process."""
    import torch

    from nha_convert.train import losses

    torch.set_num_threads(1)
    torch.manual_seed(0)
    head = torch.nn.Linear(hidden, vocabulary, bias=False).requires_grad_(False)
    student = torch.randn(1, tokens, hidden, requires_grad=True)
    teacher = student.detach() + 0.5 * torch.randn(1, tokens, hidden)
    labels = torch.randint(0, vocabulary, (1, tokens))
    targets = losses.shifted_targets({"labels": labels, "position_ids": torch.arange(tokens)[None]})
    losses.CHUNK = chunk or vocabulary * tokens
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    before = peak_and_present()[1]
    start = time.monotonic()
    sums = losses.token_sums(head, student, teacher, targets, {"kl": 1.0, "ce": 1.0})
    loss = (sums["kl"] + 0.2 * sums["ce"]) / tokens
    loss.backward()
    seconds = time.monotonic() - start
    assert student.grad is not None
    return {
        "extra_bytes": peak_and_present()[0] - before,
        "loss": loss.item(),
        "gradient_norm": student.grad.norm().item(),
        "seconds": round(seconds, 1),
    }


def measured(chunk: int, vocabulary: int, tokens: int, hidden: int) -> dict[str, Any]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, *map(str, (chunk, vocabulary, tokens, hidden))]
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back at once
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout)


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    print(json.dumps(measure(*map(int, sys.argv[1:5]))))
