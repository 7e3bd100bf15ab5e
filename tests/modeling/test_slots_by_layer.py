"""As many slots as each layer needs: configuration, cache, plan, files and a few layers at a time agree on them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from nha_convert.convert import load_student, new_parameter_names
from nha_convert.errors import InputError
from nha_convert.gate_inputs import calibrate_gates
from nha_convert.layer_slices import sliced_config
from nha_convert.model_files import read_config
from nha_convert.modeling.attention_nha import nha_layers
from nha_convert.modeling.configuration_nha import CONFIGS
from nha_convert.plan import dimensions_of, make_plan
from nha_convert.plan_memory import stage_cost
from nha_convert.recipe import Recipe
from nha_convert.settings import NHASettings
from nha_convert.swap import swap_checkpoint

SLOTS = [5, 12]


def settings(**changes: Any) -> NHASettings:
    return NHASettings(**{"window": 8, "slots": SLOTS, "sinks": 1, **changes})


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
def test_every_layer_has_its_own(pico_models: dict[str, Path], name: str) -> None:
    model = load_student(pico_models[name], settings(), dtype=torch.float32)
    assert [layer.nha.slots for _, layer in nha_layers(model)] == SLOTS
    ids = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        cache = model(input_ids=ids[:, :25], use_cache=True).past_key_values
        steps = (ids[:, at : at + 1] for at in range(25, 40))
        rest = [model(input_ids=step, past_key_values=cache, use_cache=True).logits for step in steps]
    torch.testing.assert_close(torch.cat(rest, 1), whole[:, 25:], rtol=1e-4, atol=1e-4)


def test_on_disk_as_in_memory(pico_llama: Path, tmp_path: Path) -> None:
    swap_checkpoint(pico_llama, tmp_path / "out", settings(), quiet=True)
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert stored.config.nha_slots == SLOTS
    made = load_student(pico_llama, settings())
    wanted = dict(made.named_parameters())
    for tensor in new_parameter_names(made):
        assert torch.equal(dict(stored.named_parameters())[tensor], wanted[tensor])


@pytest.mark.parametrize("full", [[], [1], [0]])
def test_the_plan_counts_each(pico_llama: Path, full: list[int]) -> None:
    recipe = Recipe.model_validate(
        {
            "model": str(pico_llama),
            "output": "unused",
            "nha": {"window": 8, "slots": SLOTS, "sinks": 1, "full_attention_layers": full},
            "data": {"sources": [{"source": "stdlib"}]},
            "stages": [{"kind": "align", "tokens": 4096, "sequence_length": 64, "batch_size": 2}],
            "runtime": {"device": "cpu"},
        }
    )
    plan = make_plan(recipe, stage_cost)
    model = load_student(pico_llama, recipe.nha)
    new = sum(dict(model.named_parameters())[name].numel() for name in new_parameter_names(model))
    assert plan["parameters"]["new"] == plan["stages"][0]["trained_parameters"] == new
    assert [row["slots"] for row in plan["layers"]] == [None if i in full else SLOTS[i] for i in range(2)]
    sizes = dimensions_of(str(pico_llama), read_config(str(pico_llama)))
    each = [sizes.nha_cache_bytes(recipe.nha, slots, 8, 4) for slots in SLOTS]
    assert each[1] > each[0]


def test_gates_that_start_from_text(pico_llama: Path) -> None:
    nha = settings(gate_init="attended")
    model = load_student(pico_llama, nha, length=64)
    calibrate_gates(model, nha, torch.randint(0, 256, (4, 64), generator=torch.Generator().manual_seed(0)), seed=0)
    assert [layer.nha.gate_proj.bias.numel() // layer.nha.groups for _, layer in nha_layers(model)] == SLOTS


def test_a_slice_of_layers_keeps_theirs(pico_llama: Path) -> None:
    model = load_student(pico_llama, settings())
    assert sliced_config(model.config, 1, 1).nha_slots == SLOTS[1:]


def test_wrong_lists_are_named(pico_llama: Path) -> None:
    with pytest.raises(InputError, match="nha.slots: the model has 2 layers and needs one number, or .* found 3"):
        load_student(pico_llama, settings(slots=[4, 4, 4]))
    base = read_config(str(pico_llama))
    fields = {key: value for key, value in base.items() if key not in ("model_type", "architectures")}
    with pytest.raises(ValueError, match="nha_slots has 1 entries but num_hidden_layers is 2"):
        CONFIGS["llama"](**fields, nha_slots=[4])
    with pytest.raises(ValueError, match="it must be at least 1"):
        CONFIGS["llama"](**fields, nha_slots=[4, 0])


@pytest.mark.parametrize("given", [0, -1, True, 2.5, "many", [4, 0], []])
def test_what_is_no_count_of_slots(given: Any) -> None:
    with pytest.raises(ValueError, match="found"):
        NHASettings(slots=given)
