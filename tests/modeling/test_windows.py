"""`set_windows`: the one knob, turned on a loaded model; the cache and the configuration follow."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from nha_convert.convert import load_student, new_parameter_names
from nha_convert.modeling.attention_nha import branch_mode, nha_layers
from nha_convert.settings import NHASettings

IDS = torch.arange(2 * 40).view(2, 40) * 7 % 251
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}


def student(folder: Path, **settings: Any) -> Any:
    return load_student(folder, NHASettings(**{"window": 6, "slots": 8, "sinks": 2, **settings}))


@torch.no_grad()
@pytest.mark.parametrize("windows", [0, 11, 4096, "full", [3, 17], ["full", 5], [0, "full"]])
def test_set_is_converted_so(pico: Path, windows: Any) -> None:
    """A model whose windows were set computes and generates what one converted with these windows does."""
    model, wanted = student(pico), student(pico, window=windows)
    model.set_windows(windows)
    assert torch.equal(model(IDS).logits, wanted(IDS).logits)
    cache = model.new_cache()
    kinds = [getattr(layer, "is_nha", False) for layer in cache.layers]
    each = windows if isinstance(windows, list) else [windows] * 2
    assert kinds == [window != "full" for window in each]
    assert torch.equal(model.generate(IDS, **GREEDY), wanted.generate(IDS, **GREEDY))
    assert torch.equal(model.generate(IDS, **GREEDY), model.generate(IDS, use_cache=False, **GREEDY))


@torch.no_grad()
def test_there_and_back(pico_llama: Path) -> None:
    model = student(pico_llama)
    before = model(IDS).logits
    for windows, config in (("full", ["full", "full"]), ({0: 3}, [3, "full"]), ({1: 9}, [3, 9]), (6, [6, 6])):
        model.set_windows(windows)
        assert model.config.nha_windows == model.model.config.nha_windows == config
    assert torch.equal(model(IDS).logits, before)


@torch.no_grad()
def test_windows_are_saved_with_the_gates(pico: Path, tmp_path: Path) -> None:
    """Saved with full windows, the model still has its gates, and can be given windows again."""
    model = student(pico, full_attention_layers=[1])
    before = model(IDS).logits
    model.set_windows("full")
    model.save_pretrained(tmp_path)
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert again.config.nha_windows == ["full", None] and len(new_parameter_names(again)) == 4
    assert torch.equal(again(IDS).logits, AutoModelForCausalLM.from_pretrained(pico)(IDS).logits)
    again.set_windows([6, "full"])
    assert torch.equal(again(IDS).logits, before)


@pytest.mark.parametrize(
    ("windows", "words"),
    [
        (-1, "window is -1"),
        (True, "True"),
        (None, "None"),
        ("half", "'half'"),
        (2.5, "2.5"),
        ([6], "1 entries, but the model has 2 layers"),
        ([6, 6], "layer 1 was kept as full attention"),
        ([-2, "full"], "layer 0 is -2"),
        ({2: 6}, "no layer 2"),
        ({1: 6}, "no gates"),
        ({0: None}, "layer 0 is None"),
        ({"0": 6}, "no layer '0'"),
    ],
)
def test_what_is_no_window_is_refused_and_changes_nothing(pico_llama: Path, windows: Any, words: str) -> None:
    model = student(pico_llama, full_attention_layers=[1])
    with pytest.raises(ValueError, match=words):
        model.set_windows(windows)
    assert model.config.nha_windows == [6, None] and nha_layers(model)[0][1].nha_window == 6


@torch.no_grad()
@pytest.mark.parametrize(("before", "after"), [(6, 9), (9, 6), (6, "full"), ("full", 6)])
def test_a_cache_of_other_windows_is_refused(pico_llama: Path, before: Any, after: Any) -> None:
    model = student(pico_llama)
    model.set_windows(before)
    cache = model(IDS, use_cache=True).past_key_values
    model.set_windows(after)
    with pytest.raises(ValueError, match=r"new_cache\(\)"):
        model(IDS[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match=r"new_cache\(\)"):
        model.generate(torch.cat((IDS, IDS[:, :1]), 1), past_key_values=cache, **GREEDY)
    model.set_windows(before)
    model(IDS[:, :1], past_key_values=cache)


@torch.no_grad()
def test_branches_of_full_windows(pico_llama: Path) -> None:
    """An ablation leaves a layer alone that does not run NHA now."""
    model = student(pico_llama)
    model.set_windows([6, "full"])
    with branch_mode(model, "none"):
        partly = model(IDS).logits
    wanted = student(pico_llama, full_attention_layers=[1])
    with branch_mode(wanted, "none"):
        assert torch.equal(partly, wanted(IDS).logits)
