"""Export and verify: an exported folder loads alone, computes the same, and tampering is found."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nha_convert.convert import load_student, new_parameter_names
from nha_convert.errors import InputError, WorkError
from nha_convert.export import export_model
from nha_convert.recipe import load_recipe
from nha_convert.remote_code import check_imports, code_files
from nha_convert.settings import NHASettings
from nha_convert.tensor_files import stored_tensors
from nha_convert.verify import verify_checkpoint

SETTINGS = NHASettings(slots=8, window=16, sinks=2, full_attention_layers=[0])
RECIPE = load_recipe("demo", ["nha.slots=8", "nha.window=16", "nha.full_attention_layers=[0]"])


def student(folder: Path, train: bool, settings: NHASettings = SETTINGS) -> Any:
    """A student whose gates moved; with `train` its attention projections too, as a distill stage leaves them."""
    model = load_student(folder, settings, dtype=torch.float32)
    new = new_parameter_names(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in new or (train and name.endswith(("q_proj.weight", "o_proj.weight"))):
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def export(folder: Path, out: Path, tokenizer: Any, train: bool = True) -> tuple[Any, Path]:
    """Export a student, with the logits it must reproduce beside it."""
    model = student(folder, train)
    export_model(model, tokenizer, out, teacher_dir=folder, recipe=RECIPE)
    input_ids = torch.arange(80).view(2, 40) * 3 % 256
    with torch.no_grad():
        logits = model(input_ids=input_ids).logits
    save_file({"input_ids": input_ids, "logits": logits}, out.parent / "export_check.safetensors")
    return model, out


@pytest.fixture(scope="module")
def exported(pico_llama: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return export(pico_llama, tmp_path_factory.mktemp("run") / "export", tokenizer)


@pytest.mark.parametrize("name", ["llama_tied_rope", "qwen3_tied"])
def test_fresh_process_reproduces_the_run(name: str, pico_models: Any, tokenizer: Any, tmp_path: Path) -> None:
    _, out = export(pico_models[name], tmp_path / "export", tokenizer)
    result = verify_checkpoint(out, teacher=pico_models[name], quiet=True)
    assert result["passed"], result["failures"]
    assert result["max_logit_difference"] <= 1e-5
    assert result["max_cached_difference"] <= 1e-5 * 10  # logits of these random models reach about 10
    assert result["changed_base_tensors"] == 4
    assert "max_teacher_difference" not in result


def test_untouched_weights_in_shards_are_the_teacher(pico_models: Any, tokenizer: Any, tmp_path: Path) -> None:
    teacher = pico_models["qwen3"]
    model = student(teacher, train=False)
    out = export_model(model, tokenizer, tmp_path / "export", teacher_dir=teacher, max_shard_size="100KB")
    index = json.loads((out / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    names: list[str] = []
    for shard in sorted(set(index.values())):
        with safe_open(out / shard, "pt") as file:
            names += file.keys()
    assert len(set(index.values())) > 1
    assert sorted(names) == sorted(index)
    result = verify_checkpoint(out, teacher=teacher, quiet=True)
    assert result["passed"], result["failures"]
    assert result["max_teacher_difference"] == 0.0
    assert result["changed_base_tensors"] == 0
    assert "max_logit_difference" not in result


def copy_folder(source: Path, target: Path) -> Path:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_tampered_weights_fail(exported: tuple[Any, Path], pico_llama: Path, tmp_path: Path) -> None:
    out = copy_folder(exported[1], tmp_path / "tampered")
    tensors = load_file(out / "model.safetensors")
    tensors["model.layers.1.self_attn.nha.slot_bias"] += 0.5
    tensors["model.norm.weight"][0] += 1e-6
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    expected = exported[1].parent / "export_check.safetensors"
    result = verify_checkpoint(out, teacher=pico_llama, expected=expected, quiet=True)
    assert not result["passed"]
    assert any("model.safetensors: was changed" in line for line in result["failures"])
    assert any("the run's logits" in line for line in result["failures"])
    assert any("model.norm.weight: differs from the teacher's" in line for line in result["failures"])


def test_broken_code_fails_with_its_reason(exported: tuple[Any, Path], tmp_path: Path) -> None:
    out = copy_folder(exported[1], tmp_path / "broken")
    path = out / "ops.py"
    path.write_text(path.read_text(encoding="utf-8") + "\n\nimport nha_kernels\n", encoding="utf-8")
    result = verify_checkpoint(out, quiet=True)
    assert any("does not load or run alone" in line and "nha_kernels" in line for line in result["failures"])


def test_base_tensors_keep_bytes_and_dtype(pico_models: Any, tokenizer: Any, tmp_path: Path) -> None:
    """A bf16 teacher trained in fp32: what was not trained stays bf16, byte for byte; the model loads as fp32."""
    teacher = copy_folder(pico_models["qwen2"], tmp_path / "teacher")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(teacher / "model.safetensors").items()}
    save_file(tensors, teacher / "model.safetensors", {"format": "pt"})
    model, out = export(teacher, tmp_path / "export", tokenizer)
    result = verify_checkpoint(out, teacher=teacher, quiet=True)
    assert result["passed"], result["failures"]
    assert result["dtype"] == "float32"
    stored = stored_tensors(out)
    assert stored["model.embed_tokens.weight"].dtype == "BF16"
    assert stored["model.layers.0.self_attn.q_proj.weight"].dtype == "F32"
    manifest = json.loads((out / "export.json").read_text(encoding="utf-8"))
    assert set(manifest["new"]) == new_parameter_names(model)
    assert set(stored) == set(tensors) | set(manifest["new"])


def test_change_that_no_stage_trains_stops_the_export(pico_llama: Path, tokenizer: Any, tmp_path: Path) -> None:
    model = student(pico_llama, False)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-6
    with pytest.raises(WorkError, match="mlp.up_proj.weight"):
        export_model(model, tokenizer, tmp_path / "export", teacher_dir=pico_llama, recipe=RECIPE)
    assert list(tmp_path.iterdir()) == []


def test_occupied_folder_is_refused(pico_llama: Path, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="not an empty folder"):
        export_model(student(pico_llama, False), tokenizer, tmp_path, teacher_dir=pico_llama)
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_verify_wants_code_in_the_folder(pico_llama: Path) -> None:
    with pytest.raises(InputError, match="auto_map"):
        verify_checkpoint(pico_llama, quiet=True)


def test_card_and_recipe_travel(exported: tuple[Any, Path]) -> None:
    card = (exported[1] / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "full, 16" in card
    assert "4 base tensors (o_proj, q_proj) were trained" in card
    assert (exported[1] / "recipe.yaml").read_text(encoding="utf-8") in card
    config = json.loads((exported[1] / "config.json").read_text(encoding="utf-8"))
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_nha.NHALlamaForCausalLM"
    assert not any(isinstance(value, str) and value.startswith("/") for value in config.values())


def test_code_is_flat() -> None:
    files = code_files()
    assert {"configuration_nha.py", "modeling_nha.py", "attention_nha.py", "cache_nha.py", "ops.py"} <= set(files)
    for name, source in files.items():
        assert "/" not in name
        assert "nha_kernels" not in source and "nha_convert" not in source.replace("nha-convert", ""), name


@pytest.mark.parametrize(
    "source",
    [
        "from .. import a",
        "from . import a",
        "from ..a import b",
        "from .a.b import c",
        "import peft",
        "from nha_kernels import x",
    ],
)
def test_code_that_cannot_travel_is_refused(source: str) -> None:
    with pytest.raises(RuntimeError):
        check_imports("file.py", source)


def test_code_that_can_travel_is_accepted() -> None:
    optional = "try:\n    import triton\nexcept ImportError:\n    pass\n"
    check_imports("file.py", f"import math\nimport torch.nn\nfrom .a import b\n{optional}")
    with pytest.raises(RuntimeError, match="triton"):
        check_imports("file.py", "import triton")
