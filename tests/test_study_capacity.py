"""The yardstick of capacity: its mask against a loop, and that with everything kept it is the teacher."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nha_convert.convert import load_student
from nha_convert.modeling.attention_nha import branch_mode, teacher_mode
from nha_convert.settings import NHASettings
from tools import study_capacity


def test_who_is_kept() -> None:
    """Against a loop over queries and tokens."""
    torch.manual_seed(0)
    attention = torch.rand(2, 3, 20, 20).tril().div(20)
    found = study_capacity.visible(attention, window=4, kept=5)
    for batch in range(2):
        for head in range(3):
            for query in range(20):
                far = range(max(0, query - 3))
                later = {token: float(attention[batch, head, max(query, token + 4) :, token].sum()) for token in far}
                kept = sorted(later, key=lambda token: later[token])[-5:]
                wanted = {*kept, *range(max(0, query - 3), query + 1)}
                assert set(found[batch, head, query].nonzero().flatten().tolist()) == wanted


def test_everything_kept_is_the_teacher(pico_llama: Path) -> None:
    model = load_student(pico_llama, NHASettings(window=4, slots=8, sinks=0), dtype=torch.float32).eval()
    ids = torch.randint(0, 200, (2, 40), generator=torch.Generator().manual_seed(0))

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return model(ids, use_cache=False).logits

    with teacher_mode(model):
        wanted = logits()
    with branch_mode(model, "window"):
        window = logits()
    with study_capacity.keeping(40):
        torch.testing.assert_close(logits(), wanted, atol=1e-4, rtol=0)
        with branch_mode(model, "window"):
            assert torch.equal(logits(), window)
    with study_capacity.keeping(2):
        few = logits()
    assert (few - wanted).abs().max() > 1e-3 and not torch.equal(few, window)


def test_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows as they are measured."""
    given = {"teacher": 3.0, "window": 4.0, "both": 3.25, "recovery": 0.75}
    monkeypatch.setattr(study_capacity, "recovery", lambda *_: given)
    monkeypatch.setattr(study_capacity, "held_out_tokens", lambda *_: None)
    rows = study_capacity.measured("embedded", 32)
    assert rows[0]["nll"] == {"kept": 3.25, "teacher": 3.0, "window": 4.0}
    assert [row["kept"] for row in rows] == list(study_capacity.KEPT)
    assert "| embedded | 32 | 0.750 | 0.750 | 0.750 | 0.750 | 0.750 |" in study_capacity.page(rows)
