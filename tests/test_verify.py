"""Verify: every family passes, and each kind of damage is found and named, foreign code without running it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nha_convert.convert import load_student
from nha_convert.publish.checkpoint_probe import token_error
from nha_convert.publish.export import export_model
from nha_convert.publish.verify import PROBE, judge, verify_checkpoint
from nha_convert.publish.verify_files import code_problems, compare_files, compare_teacher
from nha_convert.settings import NHASettings
from tests.conftest import PICO_MODELS

SETTINGS = NHASettings(slots=8, window=16, sinks=2, full_attention_layers=[0])
MANY = """
import json, sys
sys.path.insert(0, sys.argv[1])
import checkpoint_probe
sys.meta_path.insert(0, checkpoint_probe.Refuse())
jobs = json.load(open(sys.argv[2]))
found = {name: checkpoint_probe.probe(job, sys.argv[3] + ".scratch") for name, job in jobs.items()}
json.dump(found, open(sys.argv[3], "w"))
"""


@pytest.fixture(scope="module")
def exports(
    pico_models: dict[str, Path], tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """An export of every family in several shards, its base tensors untouched, its gates random."""
    root, generator = tmp_path_factory.mktemp("exports"), torch.Generator().manual_seed(0)
    folders = {}
    for name in PICO_MODELS:
        model = load_student(pico_models[name], SETTINGS, dtype=torch.float32)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if ".nha." in key:
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        folders[name] = export_model(
            model, tokenizer, root / name, teacher_dir=pico_models[name], max_shard_size="150KB"
        )
    return folders


@pytest.fixture(scope="module")
def measured(
    exports: dict[str, Path], pico_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What the probe measures of each, in one fresh process that cannot import this package."""
    work = tmp_path_factory.mktemp("probe")
    jobs = {
        name: {
            "checkpoint": str(out),
            "expected": None,
            "teacher": str(pico_models[name]),
            "memory": None,
            "tokenizer": True,
        }
        for name, out in exports.items()
    }
    (work / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    subprocess.run(
        [sys.executable, "-I", "-c", MANY, str(PROBE.parent), str(work / "jobs.json"), str(work / "results.json")],
        check=True,
        cwd=work,
        capture_output=True,
        env={"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(work / "modules"), "OMP_NUM_THREADS": "1"},
    )
    results: dict[str, dict[str, Any]] = json.loads((work / "results.json").read_text(encoding="utf-8"))
    return results


@pytest.mark.parametrize("name", sorted(PICO_MODELS))
def test_every_family_passes(
    name: str, measured: dict[str, Any], exports: dict[str, Path], pico_models: dict[str, Path]
) -> None:
    result, out = measured[name], exports[name]
    assert judge(result) == []
    assert result["max_teacher_difference"] == result["max_set_windows_difference"] == 0.0
    assert result["padded_error"] <= 1e-5 and result["cached_error"] <= 1e-5
    assert result["greedy_equal"] and result["chunked_equal"] and result["beams_equal"]
    assert result["model"].startswith("NHA") and len(result["greedy_tokens"]) == 16
    manifest = json.loads((out / "export.json").read_text(encoding="utf-8"))
    assert (out / "model.safetensors.index.json").is_file()
    assert compare_files(out, manifest) == []
    assert compare_teacher(out, pico_models[name], manifest) == ([], [])
    assert code_problems(out, json.loads((out / "config.json").read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("cached_error", 2e-5, "decoding with cache"),
        ("padded_error", float("nan"), "without its padding"),
        ("chunked_equal", False, "in chunks"),
        ("beams_equal", False, "beam search"),
        ("max_teacher_difference", 1e-9, "windows full"),
        ("max_set_windows_difference", float("nan"), "set_windows"),
        ("vocabulary_fits", False, "no embedding"),
    ],
)
def test_a_bad_measurement_fails(key: str, value: Any, words: str, measured: dict[str, Any]) -> None:
    failures = judge(measured["llama"] | {key: value})
    assert len(failures) == 1 and words in failures[0]


def test_rerouted_tokens_are_forgiven_and_broken_stretches_are_not() -> None:
    """A token that went to other experts differs altogether; a cache that is wrong differs over a stretch."""
    wanted = torch.randn(2, 64, 8, generator=torch.Generator().manual_seed(0))
    one, stretch, broken = wanted.clone(), wanted.clone(), wanted.clone()
    one[0, 5] += 3
    stretch[1, 32:48] += 3
    broken[0, 5, 0] = float("nan")
    assert token_error(one, wanted, routed=False)[1] > 0.5
    absolute, relative = token_error(one, wanted, routed=True)
    assert absolute == pytest.approx(3.0) and relative == 0.0
    assert token_error(stretch, wanted, routed=True)[1] > 0.5
    assert not token_error(broken, wanted, routed=True)[1] <= 1


def copied(exports: dict[str, Path], folder: Path) -> Path:
    return Path(shutil.copytree(exports["llama"], folder / "copy"))


def hostile_code(out: Path, marker: Path) -> None:
    with (out / "modeling_nha.py").open("a", encoding="utf-8") as file:
        file.write(f"\nopen({str(marker)!r}, 'w').close()\n")


def hostile_auto_map(out: Path, marker: Path) -> None:
    (out / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\n", encoding="utf-8")
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    config["auto_map"]["AutoModelForCausalLM"] = "evil.NHALlamaForCausalLM"
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")


def code_of_another_repository(out: Path, marker: Path) -> None:
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    config["auto_map"]["AutoConfig"] = "somebody/else--configuration_nha.NHALlamaConfig"
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")


def hostile_tokenizer(out: Path, marker: Path) -> None:
    (out / "tok.py").write_text(f"open({str(marker)!r}, 'w').close()\n", encoding="utf-8")
    settings = json.loads((out / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["auto_map"] = {"AutoTokenizer": ["tok.Slow", "tok.Fast"]}
    (out / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (hostile_code, "modeling_nha.py: not the code of this version"),
        (hostile_auto_map, "auto_map gives AutoModelForCausalLM as 'evil.NHALlamaForCausalLM'"),
        (code_of_another_repository, "somebody/else--configuration_nha"),
        (hostile_tokenizer, "tokenizer_config.json: auto_map"),
    ],
)
def test_foreign_code_is_not_run(damage: Any, words: str, exports: dict[str, Path], tmp_path: Path) -> None:
    out, marker = copied(exports, tmp_path), tmp_path / "was_run"
    damage(out, marker)
    result = verify_checkpoint(out, quiet=True)
    assert not result["passed"] and not marker.exists()
    assert any(words in line and "nothing was run: --trust-code runs it" in line for line in result["failures"])
    assert "model" not in result


def test_trusted_code_is_run_and_its_failure_told(exports: dict[str, Path], tmp_path: Path) -> None:
    """Here the code needs our package, which the fresh process refuses."""
    out, marker = copied(exports, tmp_path), tmp_path / "was_run"
    hostile_code(out, marker)
    with (out / "modeling_nha.py").open("a", encoding="utf-8") as file:
        file.write("\ntry:\n    import nha_kernels\nexcept RuntimeError:\n    pass\n")
    result = verify_checkpoint(out, trust_code=True, quiet=True)
    assert marker.exists()
    changed, failed = result["failures"]
    assert changed == "modeling_nha.py: was changed after the export"
    assert failed.startswith("the checkpoint does not load or run alone: ") and "'nha_kernels' (refused" in failed


def test_files_outside_the_manifest_are_named(exports: dict[str, Path], tmp_path: Path) -> None:
    out = copied(exports, tmp_path)
    for name in ("extra.py", "model.safetensors", "notes.txt"):
        (out / name).write_bytes(b"")
    (out / "README.md").unlink()
    (out / "generation_config.json").unlink()
    problems = compare_files(out, json.loads((out / "export.json").read_text(encoding="utf-8")))
    assert [line.split(":")[0] for line in problems] == [
        "generation_config.json",
        "README.md",
        "extra.py",
        "model.safetensors",
    ]


def test_changed_and_missing_base_tensors_are_named(
    exports: dict[str, Path], pico_models: dict[str, Path], tmp_path: Path
) -> None:
    """Experts too, which the teacher's files hold one by one."""
    out = Path(shutil.copytree(exports["qwen3_moe"], tmp_path / "copy"))
    index = json.loads((out / "model.safetensors.index.json").read_text(encoding="utf-8"))
    changed, gone = "model.layers.1.mlp.experts.3.down_proj.weight", "model.layers.0.mlp.experts.0.up_proj.weight"
    for name, drop in ((changed, False), (gone, True)):
        shard = out / index["weight_map"][name]
        tensors = load_file(shard)
        if drop:
            del tensors[name], index["weight_map"][name]
        else:
            tensors[name][0, 0] += 1
        save_file(tensors, shard, {"format": "pt"})
    (out / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    manifest = json.loads((out / "export.json").read_text(encoding="utf-8"))
    names, wrong = compare_teacher(out, pico_models["qwen3_moe"], manifest)
    assert names == [changed]
    assert wrong == [
        f"{gone}: is in the teacher's weights, not in the checkpoint's",
        f"{changed}: differs from the teacher's, and no stage trained it",
    ]
