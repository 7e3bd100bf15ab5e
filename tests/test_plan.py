"""The plan's numbers against the models and states themselves."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from nha_kernels.state import NHAState
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from nha_convert.convert import nha_config
from nha_convert.errors import InputError
from nha_convert.modeling.attention_nha import nha_layers
from nha_convert.plan import dimensions_of, make_plan, model_dimensions, render_plan
from nha_convert.plan_memory import stage_cost
from nha_convert.preflight import check_inputs, check_output, finished
from nha_convert.recipe import NHASettings, Recipe, dump_recipe, parse_recipe


def recipe_of(model: Path | str, *overrides: str) -> Recipe:
    text = """\
nha: {slots: 16, window: 8, sinks: 2}
data: {sources: [{source: stdlib}, {source: recall}]}
stages:
  - {kind: align, tokens: 1k, sequence_length: 64, batch_size: 2}
  - {kind: distill, tokens: 2k, sequence_length: 64, batch_size: 2, lora: {rank: 4}}
evaluate: {sequence_length: 64}
"""
    return parse_recipe(text, "r.yaml", list(overrides), defaults={"model": str(model)})


def nothing(recipe: Recipe, index: int) -> dict[str, int]:
    """In place of `stage_cost`, which runs a step of each stage."""
    return dict.fromkeys(("trained_parameters", "trained_base_parameters"), 0)


def test_parameters_are_the_models(pico: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(pico)
    assert model_dimensions(str(pico)).parameters == sum(tensor.numel() for tensor in model.parameters())


@pytest.mark.parametrize("name", ["llama_tied_rope", "qwen3_moe"])
def test_trained_parameters_are_the_students(name: str, pico_models: dict[str, Path]) -> None:
    pico = pico_models[name]
    recipe = recipe_of(pico, "nha.full_attention_layers=[0]", "nha.slot_bias=false")
    with torch.device("meta"):
        student = AutoModelForCausalLM.from_config(nha_config(AutoConfig.from_pretrained(pico), recipe.nha))
    new = sum(tensor.numel() for _, layer in nha_layers(student) for tensor in layer.nha.parameters())
    plan = make_plan(recipe, stage_cost)
    assert plan["parameters"]["new"] == new == plan["stages"][0]["trained_parameters"]
    assert [row["new_parameters"] for row in plan["layers"]] == [0, new]
    adapted = get_peft_model(student, LoraConfig(r=4, target_modules=list(recipe.stages[1].lora.targets)))
    adapters = sum(tensor.numel() for name, tensor in adapted.named_parameters() if "lora_" in name)
    assert plan["stages"][1]["trained_parameters"] == new + adapters
    assert plan["stages"][1]["frozen_parameters"] == plan["parameters"]["model"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cache_bytes_are_the_states(pico: Path, dtype: str) -> None:
    sizes, nha = model_dimensions(str(pico)), NHASettings(slots=16, sinks=3)
    state = NHAState.new(
        1,
        sizes.groups,
        nha.slots,
        sizes.head_dim,
        window=8,
        sinks=3,
        rotary_dim=sizes.head_dim,
        dtype=getattr(torch, dtype),
    )
    held = sum(tensor.numel() * tensor.element_size() for tensor in state.tensors().values())
    assert sizes.nha_cache_bytes(nha, 8, {"float32": 4, "bfloat16": 2}[dtype]) == held


def test_plan_of_the_whole(pico_llama: Path) -> None:
    plan = make_plan(recipe_of(pico_llama, "nha.window=[8, full]"), stage_cost)
    assert json.loads(json.dumps(plan)) == plan
    assert [(row["attention"], row["window"]) for row in plan["layers"]] == [("nha", 8), ("full", None)]
    assert [(row["stage"], row["steps"]) for row in plan["stages"]] == [("align", 8), ("distill", 16)]
    assert plan["cache"][-1]["context"] == 512
    assert plan["cache"][-1]["teacher_bytes"] == 2 * 2 * 16 * 512 * 4 * 2  # k and v, G, D, tokens, fp32, layers
    assert all(row["peak_bytes"] == sum(row["memory_bytes"].values()) > 0 for row in plan["stages"])
    assert any("merged" in note for note in plan["notes"])
    from rich.console import Console

    console = Console(width=120, record=True)
    console.print(render_plan(plan))
    shown = console.export_text()
    assert "align" in shown and "2 x 64" in shown


def test_plan_warns_where_the_slots_would_see_nothing(pico_llama: Path) -> None:
    notes = make_plan(recipe_of(pico_llama, "nha.window=64"), nothing)["notes"]
    assert sum("see nothing" in note for note in notes) == 2
    assert sum("fewer than" in note and "new parameters" in note for note in notes) == 2
    assert not any("see nothing" in note for note in make_plan(recipe_of(pico_llama), nothing)["notes"])


def test_unusable_models(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="models of type gpt2 cannot be converted; supported: llama .*qwen3_moe"):
        dimensions_of("x", {"model_type": "gpt2"})
    with pytest.raises(InputError, match="is an NHA model already"):
        dimensions_of("x", {"model_type": "nha_llama"})
    with pytest.raises(InputError, match="no number for num_hidden_layers"):
        dimensions_of("x", {"model_type": "llama"})
    with pytest.raises(InputError, match="no such model folder"):
        model_dimensions(str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="holds no config.json"):
        model_dimensions(str(tmp_path))


# ---- preflight -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("nha.window=full", "nothing to train"),
        ("nha.window=[8, 8, 8]", "has 2 layers"),
        ("stages.1.sequence_length=513", "stages.1.sequence_length: 513 is beyond the 512 positions"),
        ("evaluate.sequence_length=1024", "evaluate.sequence_length: 1024 is beyond"),
        ("data.sources=[{source: text, path: /no/such/file.txt}]", "data.sources.0.path: no text found"),
        ("data.sources=[{source: dataset, path: no.jsonl}]", "data.sources.0.path: no file 'no.jsonl'"),
    ],
)
def test_preflight_refuses(pico_llama: Path, tmp_path: Path, override: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        check_inputs(recipe_of(pico_llama, override), tmp_path / "out")
    assert said in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_preflight_passes_what_is_right(pico_llama: Path, tmp_path: Path) -> None:
    check_inputs(recipe_of(pico_llama), tmp_path / "new" / "out")
    check_inputs(recipe_of(pico_llama, "nha.window=full", "stages=[]"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_truncated_weights(pico_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pico_llama, tmp_path / "model")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for cut, said in (
        (whole[:-1], "is truncated"),
        (whole[:40], "truncated inside its header"),
        (b"x" * 64, "truncat"),
    ):
        weights.write_bytes(cut)
        with pytest.raises(InputError, match=said):
            check_inputs(recipe_of(folder), tmp_path / "out")
    weights.write_bytes(whole + b"\0")
    with pytest.raises(InputError, match="is too long"):
        check_inputs(recipe_of(folder), tmp_path / "out")
    weights.unlink()
    with pytest.raises(InputError, match=r"holds no \*\.safetensors"):
        check_inputs(recipe_of(folder), tmp_path / "out")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(InputError, match="is missing, but the index names it"):
        check_inputs(recipe_of(folder), tmp_path / "out")


def test_output_folder(pico_llama: Path, tmp_path: Path) -> None:
    recipe = recipe_of(pico_llama)
    out = tmp_path / "out"
    check_output(recipe, out, resume=True)  # nothing there: starts anew
    out.mkdir()
    (out / ".recipe.yaml.partial").touch()  # a write that was killed
    check_output(recipe, out, resume=False)
    (out / "other").touch()
    with pytest.raises(InputError, match="is not empty; choose another folder"):
        check_output(recipe, out, resume=False)
    with pytest.raises(InputError, match="no recipe.yaml"):
        check_output(recipe, out, resume=True)
    (out / "recipe.yaml").write_text(dump_recipe(recipe))
    with pytest.raises(InputError, match="go on with --resume"):
        check_output(recipe, out, resume=False)
    check_output(recipe, out, resume=True)
    check_output(recipe_of(pico_llama, "output=elsewhere", "runtime.threads=3"), out, resume=True)
    with pytest.raises(InputError) as caught:
        check_output(recipe_of(pico_llama, "nha.slots=32", "~stages.1"), out, resume=True)
    said = str(caught.value)
    assert "nha.slots is 16 in the folder, 32 now" in said
    assert "stages.1.kind is distill in the folder, null now" in said
    with pytest.raises(InputError, match="is a file"):
        check_output(recipe, out / "other", resume=False)


def test_finished(tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    for name in ("eval.json", "verify.json", "report.html"):
        (tmp_path / name).write_text('{"passed": true}')
    assert not finished(tmp_path)
    (tmp_path / "export" / "config.json").touch()
    assert finished(tmp_path)
    (tmp_path / "verify.json").write_text('{"passed": false}')
    assert not finished(tmp_path)
