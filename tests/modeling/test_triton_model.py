"""A whole model on the Triton kernels (interpreted): its layers hand them what they need, and take what they give."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from nha_convert.convert import load_student
from nha_convert.settings import NHASettings

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("these tests run in Triton's interpreter", allow_module_level=True)


def results(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits of a padded batch, gradients of a layer, and greedy tokens with the cache."""
    model.zero_grad()
    logits = model(ids, attention_mask=mask).logits
    (logits * mask[..., None]).logsumexp(-1).sum().backward()
    layer = model.model.layers[0].self_attn
    grads = {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
    tokens = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    return {"logits": logits.detach() * mask[..., None], "tokens": tokens} | grads


@pytest.mark.parametrize("rotary", [False, True])
def test_a_model_runs_on_triton(pico_llama: Path, monkeypatch: pytest.MonkeyPatch, rotary: bool) -> None:
    """Forward, gradients, left padding and generation equal the PyTorch path's."""
    model = load_student(pico_llama, NHASettings(window=6, slots=8, sinks=2, slot_rotary=rotary)).eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 260, (2, 15), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    want = results(model, ids, mask)
    monkeypatch.setenv("NHA_BACKEND", "triton")
    got = results(model, ids, mask)
    assert torch.equal(got.pop("tokens"), want.pop("tokens"))
    assert want.keys() == got.keys()
    for name, y in want.items():
        assert (got[name] - y).abs().max() <= 1e-5 * max(1.0, y.abs().max().item()), name
