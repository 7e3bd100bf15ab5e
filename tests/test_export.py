"""Export and verify: an exported folder loads alone, computes the same, and tampering is found."""

import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from nha_convert.convert import load_student, new_parameter_names
from nha_convert.errors import InputError, WorkError
from nha_convert.publish.export import export_checkpoint, export_model, export_run
from nha_convert.publish.verify import verify_checkpoint
from nha_convert.publish.verify_files import compare_files, compare_teacher
from nha_convert.recipe import dump_recipe, load_recipe
from nha_convert.remote_code import check_imports, code_files
from nha_convert.settings import NHASettings
from nha_convert.swap import swap_checkpoint
from nha_convert.weights.tensor_files import same_bytes
from nha_convert.weights.weight_files import stored_tensors

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


def export(
    folder: Path, out: Path, tokenizer: Any, train: bool = True, settings: NHASettings = SETTINGS
) -> tuple[Any, Path]:
    """Export a student, with the logits it must reproduce beside it."""
    model = student(folder, train, settings)
    export_model(model, tokenizer, out, teacher_dir=folder, recipe=RECIPE)
    input_ids = torch.arange(80).view(2, 40) * 3 % 256
    with torch.no_grad():
        logits = model(input_ids=input_ids).logits
    save_file({"input_ids": input_ids, "logits": logits}, out.parent / "export_check.safetensors")
    return model, out


@pytest.fixture(scope="module")
def exported(pico_llama: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return export(pico_llama, tmp_path_factory.mktemp("run") / "export", tokenizer)


@pytest.mark.parametrize("changes", [{}, {"gate": "routed", "gate_init": "attended", "slot_rotary": True}])
def test_fresh_process_reproduces_the_run(
    pico_models: Any, tokenizer: Any, tmp_path: Path, changes: dict[str, Any]
) -> None:
    settings = SETTINGS.model_copy(update=changes)
    _, out = export(pico_models["qwen3_tied"], tmp_path / "export", tokenizer, settings=settings)
    result = verify_checkpoint(out, teacher=pico_models["qwen3_tied"], quiet=True)
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
    manifest = json.loads((out / "export.json").read_text(encoding="utf-8"))
    assert manifest["changed"] == [] and compare_teacher(out, teacher, manifest) == ([], [])


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


def test_base_tensors_keep_bytes_and_dtype(pico_models: Any, tokenizer: Any, tmp_path: Path) -> None:
    """A bf16 teacher trained in fp32: what was not trained stays bf16, byte for byte; the model loads as fp32."""
    teacher = copy_folder(pico_models["qwen2"], tmp_path / "teacher")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(teacher / "model.safetensors").items()}
    save_file(tensors, teacher / "model.safetensors", {"format": "pt"})
    model, out = export(teacher, tmp_path / "export", tokenizer)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype == torch.float32
    input_ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)
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
    assert card.startswith("---\n") and "\nlibrary_name: transformers\n" in card
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


def test_experts_are_the_teachers_bytes(pico_models: Any, tokenizer: Any, tmp_path: Path) -> None:
    """Fused in memory, one by one in the teacher's files: those names and bytes are written."""
    teacher = pico_models["qwen3_moe"]
    model = student(teacher, train=True)
    assert any("experts.gate_up_proj" in name for name in model.state_dict())
    out = export_model(model, tokenizer, tmp_path / "out", teacher_dir=teacher, recipe=RECIPE)
    ours, theirs = stored_tensors(out), stored_tensors(teacher)
    changed = {name for name in theirs if not same_bytes(ours[name], theirs[name])}
    assert changed == {f"model.layers.{layer}.self_attn.{one}_proj.weight" for layer in (0, 1) for one in "qo"}
    assert set(ours) - set(theirs) == new_parameter_names(model)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2, 0, 0] += 1e-6
    with pytest.raises(WorkError, match=r"experts\.2\.down_proj\.weight"):
        export_model(model, tokenizer, tmp_path / "again", teacher_dir=teacher, recipe=RECIPE)


def test_a_tensor_that_is_not_finite_stops_the_export(pico_llama: Path, tokenizer: Any, tmp_path: Path) -> None:
    model = student(pico_llama, False)
    with torch.no_grad():
        model.model.layers[1].self_attn.nha.slot_bias[0] = float("nan")
    with pytest.raises(WorkError, match="nha.slot_bias"):
        export_model(model, tokenizer, tmp_path / "out", teacher_dir=pico_llama)
    assert list(tmp_path.iterdir()) == []


TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if tools %}tools: {{ tools | tojson }}\n{% endif %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is <one> plus one?"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    },
}


def chat_teacher(pico: Path, folder: Path, kind: str) -> Path:
    """A teacher with added tokens, a generation config of its own, and chat templates stored in one of three ways."""
    shutil.copytree(pico, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<one>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    tokenizer.chat_template = {"default": TEMPLATE, "tool_use": "T" + TEMPLATE} if kind == "several" else TEMPLATE
    tokenizer.save_pretrained(folder)
    if kind == "inside":
        (folder / "chat_template.jinja").unlink()
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        settings = {key: value for key, value in settings.items() if key != "tokenizer_class"}
        settings["chat_template"] = TEMPLATE
        (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "generation_config.json").write_text(
        '{"eos_token_id": [257, 260],  "temperature": 0.6,\n"do_sample": true, "_from_model_config": false}', "utf-8"
    )
    return folder


def chat_ids(tokenizer: Any) -> list[Any]:
    options = {"add_generation_prompt": True, "return_dict": False}
    return [
        tokenizer.apply_chat_template(MESSAGES, **options),
        tokenizer.apply_chat_template(MESSAGES, tools=[TOOL], **options),
        tokenizer("<one> <turn> plain")["input_ids"],
    ]


@pytest.mark.parametrize("kind", ["file", "inside", "several"])
@pytest.mark.parametrize("swapped", [False, True])
def test_chat_and_generation_settings_travel(
    kind: str, swapped: bool, pico_llama: Path, tmp_path: Path
) -> None:
    teacher = chat_teacher(pico_llama, tmp_path / "teacher", kind)
    before = AutoTokenizer.from_pretrained(teacher)
    out = tmp_path / "out"
    if swapped:
        swap_checkpoint(teacher, tmp_path / "swapped", SETTINGS, quiet=True)
        export_checkpoint(tmp_path / "swapped", out, quiet=True)
    else:
        export_model(student(teacher, False), before, out, teacher_dir=teacher)
    after = AutoTokenizer.from_pretrained(out)
    assert chat_ids(after) == chat_ids(before)
    assert any(259 in ids for ids in chat_ids(after))
    exact = {"generation_config.json", "tokenizer.json"} | ({"chat_template.jinja"} if kind != "inside" else set())
    exact |= {"additional_chat_templates/tool_use.jinja"} if kind == "several" else set()
    for name in exact:
        assert (out / name).read_bytes() == (teacher / name).read_bytes(), name
    assert exact <= set(json.loads((out / "export.json").read_text(encoding="utf-8"))["files"])
    assert after.special_tokens_map == before.special_tokens_map
    assert after.get_vocab() == before.get_vocab()


def test_what_swap_wrote_is_exported_again(pico_models: Any, tmp_path: Path) -> None:
    teacher = Path(shutil.copytree(pico_models["qwen3_moe"], tmp_path / "teacher"))
    (teacher / "README.md").write_text("---\nlicense: apache-2.0\n---\n", encoding="utf-8")
    (teacher / "NOTICE").write_text("notice", encoding="utf-8")
    swap_checkpoint(teacher, tmp_path / "swapped", SETTINGS, quiet=True)
    out = tmp_path / "out"
    export_checkpoint(tmp_path / "swapped", out, teacher=str(teacher), max_shard_size="150KB", quiet=True)
    before, after = stored_tensors(tmp_path / "swapped"), stored_tensors(out)
    assert set(before) == set(after) and all(same_bytes(before[name], after[name]) for name in before)
    assert len({tensor.path for tensor in after.values()}) > 2
    assert max(path.stat().st_size for path in out.glob("*.safetensors")) < 170_000
    manifest = json.loads((out / "export.json").read_text(encoding="utf-8"))
    assert manifest["changed"] == [] and manifest["base_model"] == "teacher"
    assert set(manifest["new"]) == {name for name in after if ".nha." in name} != set()
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "license: apache-2.0" in card and "byte for byte" in card and (out / "NOTICE").is_file()
    assert compare_files(out, manifest) == [] and compare_teacher(out, teacher, manifest) == ([], [])
    input_ids = torch.arange(40)[None]
    with torch.no_grad():
        logits = [
            AutoModelForCausalLM.from_pretrained(one)(input_ids).logits for one in (tmp_path / "swapped", out)
        ]
    assert torch.equal(*logits)
    again = export_checkpoint(out, tmp_path / "again", quiet=True)
    assert (again / "README.md").read_text(encoding="utf-8") == card
    assert json.loads((again / "export.json").read_text(encoding="utf-8"))["base_model"] == "teacher"
    assert not (again / "model.safetensors.index.json").exists()


def test_base_of_a_swap_is_unknown_until_named(pico_llama: Path, tmp_path: Path) -> None:
    swap_checkpoint(pico_llama, tmp_path / "swapped", SETTINGS, quiet=True)
    out = export_checkpoint(tmp_path / "swapped", tmp_path / "out", quiet=True)
    assert json.loads((out / "export.json").read_text(encoding="utf-8"))["changed"] is None
    assert "The base model is not recorded" in (out / "README.md").read_text(encoding="utf-8")


def test_wrong_sources_are_refused(pico_models: Any, tmp_path: Path) -> None:
    swap_checkpoint(pico_models["llama"], tmp_path / "swapped", SETTINGS, quiet=True)
    before = sorted(path.name for path in tmp_path.iterdir())
    for folder, teacher, words in (
        (tmp_path / "swapped", str(pico_models["qwen3"]), "--teacher .*has no tensors like"),
        (pico_models["llama"], None, "is a llama model, not an NHA checkpoint; convert it: nha-convert swap"),
        (tmp_path / "absent", None, "config.json: is no model's configuration"),
    ):
        with pytest.raises(InputError, match=words):
            export_checkpoint(folder, tmp_path / "out", teacher=teacher, quiet=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_run_is_exported_without_its_paths(pico_llama: Path, tmp_path: Path) -> None:
    run = tmp_path / "private" / "run"
    run.mkdir(parents=True)
    overrides = [f"model={pico_llama}", f"output={run}", "nha.slots=8", "nha.window=16", "stages=[]"]
    (run / "recipe.yaml").write_text(dump_recipe(load_recipe("demo", overrides)), encoding="utf-8")
    out = export_run(run, tmp_path / "out", max_shard_size="100KB", quiet=True)
    assert len(list(out.glob("*.safetensors"))) > 1
    for path in out.iterdir():
        if path.suffix not in (".safetensors", ".py"):
            text = path.read_text(encoding="utf-8")
            assert "private" not in text and str(tmp_path) not in text and str(pico_llama) not in text, path.name


def test_export_holds_one_piece_in_memory(pico_llama: Path, tmp_path: Path) -> None:
    """64 MB of weights in one shard are written with far less memory than that."""
    swap_checkpoint(pico_llama, tmp_path / "swapped", SETTINGS, quiet=True)
    extra = {f"model.layers.0.extra.{index}": torch.ones(1 << 20) for index in range(16)}
    tensors = load_file(tmp_path / "swapped" / "model-base.safetensors") | load_file(
        tmp_path / "swapped" / "model-nha.safetensors"
    )
    for path in (tmp_path / "swapped").glob("model*"):
        path.unlink()
    save_file(tensors | extra, tmp_path / "swapped" / "model.safetensors", {"format": "pt"})
    del tensors, extra
    tracemalloc.start()
    try:
        out = export_checkpoint(tmp_path / "swapped", tmp_path / "out", quiet=True)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (out / "model.safetensors").stat().st_size > 64 << 20
    assert peak < 16 << 20
