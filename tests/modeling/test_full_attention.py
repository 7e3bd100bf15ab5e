"""In teacher mode the student is the teacher bit for bit; windows that are full stand in test_families.py."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from nha_convert.convert import load_student
from nha_convert.modeling.attention_nha import nha_layers, teacher_mode
from nha_convert.settings import NHASettings

IDS = torch.arange(2 * 40).view(2, 40) * 7 % 251
LEFT = torch.ones(2, 40, dtype=torch.long)
LEFT[1, :11] = 0


@torch.no_grad()
def test_teacher_mode_is_the_teacher(pico: Path) -> None:
    teacher = AutoModelForCausalLM.from_pretrained(pico)
    student = load_student(pico, NHASettings(window=4, slots=8))
    with teacher_mode(student):
        for mask in (None, LEFT):
            assert torch.equal(student(IDS, attention_mask=mask).logits, teacher(IDS, attention_mask=mask).logits)
        options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "attention_mask": LEFT}
        assert torch.equal(student.generate(IDS, **options), teacher.generate(IDS, **options))
    assert not torch.allclose(student(IDS).logits, teacher(IDS).logits, atol=1e-2)


def test_teacher_mode_restores_each_layer(pico_llama: Path) -> None:
    student = load_student(pico_llama, NHASettings(window=4, slots=8))
    layers = [module for _, module in nha_layers(student)]
    layers[1].nha_mode = "teacher"
    try:
        with teacher_mode(student):
            assert [layer.nha_mode for layer in layers] == ["teacher", "teacher"]
            raise RuntimeError
    except RuntimeError:
        pass
    assert [layer.nha_mode for layer in layers] == ["student", "teacher"]
