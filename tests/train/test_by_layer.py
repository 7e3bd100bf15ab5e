"""A few layers at a time give what all layers at once give."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runs import write_recipe
from pydantic import ValidationError
from stages import make_recipe
from transformers import AutoTokenizer

from nha_convert.convert import load_student
from nha_convert.errors import InputError, WorkError
from nha_convert.layer_slices import LayerSlices
from nha_convert.pipeline import check_engine, run
from nha_convert.recipe import Recipe, load_recipe
from nha_convert.streamed import is_streamed, load_streamed
from nha_convert.train import by_layer, run_stage, trainer
from nha_convert.train.hidden_cache import NAME, HiddenCache
from nha_convert.train.objective import Objective

SPAN = 3 * 96  # tokens of three steps


def recipe(text: Path, layers: int | None = None, **stage: Any) -> Recipe:
    """Nine steps of alignment; two rows of 48 tokens a step."""
    packing = stage.pop("packing", "windows")
    common = {"kind": "align", "tokens": 9 * 96, "sequence_length": 48, "batch_size": 2, "save_steps": 4}
    return make_recipe(
        text,
        data={"sources": [{"source": "text", "path": str(text)}], "packing": packing},
        stages=[{**common, "learning_rate": 0.02, "warmup": 0.2, **stage}],
        runtime={"device": "cpu", "logging_steps": 2, "layers_at_once": layers, "cached_tokens": SPAN},
    )


def aligned(model: Path, run_dir: Path, plan: Recipe, *, resume: bool = False) -> dict[str, Any]:
    """Tensors, done.json and the rows of metrics.jsonl after the stage."""
    torch.set_num_threads(1)
    run_dir.mkdir(parents=True, exist_ok=True)
    student = load_student(model, plan.nha, dtype=getattr(torch, plan.runtime.dtype), seed=plan.seed)
    tokenizer = AutoTokenizer.from_pretrained(model)
    student, done = run_stage(student, tokenizer, plan, 0, run_dir, resume=resume, quiet=True, base=model)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        del row["seconds"], row["tokens_per_second"]
    return {"tensors": student.state_dict(), "done": done, "rows": rows, "windows": student.config.nha_windows}


def different(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What of two runs is not equal: tensors, windows, rows of metrics; losses to the last place of their sum."""
    found = [name for name, tensor in one["tensors"].items() if not torch.equal(tensor, other["tensors"][name])]
    found += ["windows"] * (one["windows"] != other["windows"])
    found += ["steps"] * (one["done"]["steps"] != other["done"]["steps"] or one["done"]["steps"] != 9)
    found += ["rows"] * (len(one["rows"]) != len(other["rows"]))
    for ours, theirs in zip(one["rows"], other["rows"]):
        close = ours["loss"] == pytest.approx(theirs["loss"], abs=2e-6)
        if not close or {**ours, "loss": 0} != {**theirs, "loss": 0}:
            found.append(f"row of step {ours['step']}")
    return found


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "memory": {"memory_weight": 0.5},
    "random windows": {"random_windows": [0, 4, 8, 16]},
    "own windows": {"windows": 4, "schedule": "wsd", "decay": 0.3},
    "packed documents": {"packing": "documents"},
    "cut": {"batch_size": 4, "tokens": 9 * 192},
}


@pytest.mark.parametrize("case", list(CASES))
def test_as_all_at_once(pico_llama: Path, text: Path, tmp_path: Path, case: str) -> None:
    whole, parts = recipe(text, None, **CASES[case]), recipe(text, 1, **CASES[case])
    if case == "cut":
        parts.runtime.micro_batch = whole.runtime.micro_batch = 3
    one, other = aligned(pico_llama, tmp_path / "whole", whole), aligned(pico_llama, tmp_path / "parts", parts)
    assert different(one, other) == []
    assert one["rows"][0]["loss"] > one["rows"][-1]["loss"]
    assert not list(tmp_path.rglob(NAME))


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_moe", "mistral"])
def test_every_family(pico_models: dict[str, Path], text: Path, tmp_path: Path, family: str) -> None:
    """Sliding layers, biases, norms of queries and keys, and experts that are stored apart."""
    model = pico_models[family]
    whole, parts = (aligned(model, tmp_path / str(layers), recipe(text, layers)) for layers in (None, 1))
    assert different(whole, parts) == []


def test_layers_that_stay_full(pico_llama: Path, text: Path, tmp_path: Path) -> None:
    """A group without a student passes on what it is given; what comes after the last student is not read."""
    plans = [recipe(text, layers) for layers in (None, 1)]
    for plan in plans:
        plan.nha.full_attention_layers = [0]
    assert different(*(aligned(pico_llama, tmp_path / str(number), plan) for number, plan in enumerate(plans))) == []


@pytest.mark.parametrize(("first", "then"), [(1, None), (None, 1), (1, 1)])
def test_either_goes_on_from_the_other(
    pico_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int | None, then: int | None
) -> None:
    wanted = aligned(pico_llama, tmp_path / "wanted", recipe(text))
    real = trainer.finish_checkpoint

    def finish(partial: Path, marker: dict[str, Any]) -> None:
        real(partial, marker)
        raise WorkError(f"stopped after step {marker['step']}")

    with monkeypatch.context() as patch, pytest.raises(WorkError, match="stopped after step [34]$"):
        patch.setattr(trainer, "finish_checkpoint", finish)
        aligned(pico_llama, tmp_path / "run", recipe(text, first))
    assert different(wanted, aligned(pico_llama, tmp_path / "run", recipe(text, then), resume=True)) == []


def test_sigterm_leaves_the_span_before(
    pico_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a span layers are at different steps, so it is begun anew."""
    real = by_layer._Group.step

    def step(self: Any, number: int, *rest: Any) -> None:
        real(self, number, *rest)
        if number == 4 and self.first == 1:
            self.trainer.job.stop.set()

    with monkeypatch.context() as patch, pytest.raises(WorkError, match="stopped by SIGTERM at step 3 of 9, which is"):
        patch.setattr(by_layer._Group, "step", step)
        aligned(pico_llama, tmp_path / "run", recipe(text, 1))
    assert not list(tmp_path.rglob(NAME))
    wanted = aligned(pico_llama, tmp_path / "wanted", recipe(text))
    assert different(wanted, aligned(pico_llama, tmp_path / "run", recipe(text, 1), resume=True)) == []


def test_a_loss_that_is_not_finite_names_its_layer(
    pico_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = by_layer._Group.step

    def step(self: Any, number: int, *rest: Any) -> None:
        if number == 4 and self.first == 1:
            with torch.no_grad():
                self.model.model.layers[0].self_attn.nha.gate_proj.weight.fill_(float("nan"))
        real(self, number, *rest)

    monkeypatch.setattr(by_layer._Group, "step", step)
    with pytest.raises(WorkError, match=r"stage 01-align, step 5: the loss is not finite, worst in layer 1; lower"):
        aligned(pico_llama, tmp_path / "run", recipe(text, 1))


def _keep(states: dict[int, torch.Tensor], index: int, module: Any, args: Any, output: torch.Tensor) -> None:
    states[index] = output


@pytest.mark.parametrize(("first", "count"), [(0, 1), (1, 1), (0, 2)])
def test_slices_compute_what_the_model_does(pico_models: dict[str, Path], text: Path, first: int, count: int) -> None:
    for model in pico_models.values():
        student = load_student(model, recipe(text).nha, dtype=torch.float32)
        states: dict[int, torch.Tensor] = {}
        for index, layer in enumerate(student.model.layers):
            layer.register_forward_hook(partial(_keep, states, index))
        ids = torch.randint(0, 50, (2, 40), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            student(input_ids=ids, use_cache=False)
            slices = LayerSlices(model, student.config, torch.float32)
            gates = {name: tensor for name, tensor in student.named_parameters() if ".nha." in name}
            part = slices.load(first, count, gates, torch.device("cpu"))
            before = slices.embed(ids) if first == 0 else states[first - 1]
            found = Objective.run(part, {"input_ids": ids, "hidden_states": before})
        assert torch.equal(found, states[first + count - 1]), model.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_come_back(tmp_path: Path, dtype: torch.dtype) -> None:
    states = torch.randn(6, 5, 4).to(dtype)
    with HiddenCache(tmp_path, 6, (5, 4), dtype) as cache:
        cache.write(4, states[4:])
        cache.write(0, states[:4])
        assert torch.equal(cache.read(3, 2), states[3:5]) and cache.read(3, 2).dtype == dtype
    assert list(tmp_path.iterdir()) == []


# ---- refusals ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"runtime": {"layers_at_once": 1, "engine": "fsdp2"}}, "with runtime.engine fsdp2"),
        ({"runtime": {"layers_at_once": 1}, "stages": [{"kind": "finetune", "tokens": 96}]}, "no stage is of kind"),
        (
            {"runtime": {"layers_at_once": 1}, "stages": [{"kind": "align", "tokens": 96, "train": ["gates", "lora"]}]},
            "can train gates alone; its train is",
        ),
        (
            {
                "runtime": {"layers_at_once": 1},
                "stages": [{"kind": "distill", "tokens": 96}, {"kind": "align", "tokens": 96}],
            },
            "stages, distill trains more",
        ),
    ],
)
def test_what_needs_the_whole_model_is_refused(text: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        make_recipe(text, **changes)
    assert said in str(caught.value) and "runtime.layers_at_once" in str(caught.value)


def test_too_little_space_is_refused(pico_llama: Path, text: Path, tmp_path: Path, monkeypatch: Any) -> None:
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("nha_convert.train.hidden_cache.shutil.disk_usage", lambda _: usage)
    with pytest.raises(Exception, match=r"hidden states of 288 tokens take .* lower runtime.cached_tokens"):
        aligned(pico_llama, tmp_path, recipe(text, 1))


# ---- the whole run -------------------------------------------------------------------------------
ALIGN = {"kind": "align", "learning_rate": 0.02}
RUNS: dict[str, tuple[str, list[dict[str, Any]], tuple[str, ...], tuple[str, ...]]] = {
    "then whole": ("qwen3_moe", [ALIGN, {"kind": "distill"}], (), ("swapped", "aligned", "final")),
    # routed gates start with the whole model in memory, so a stage that has it comes first
    "routed, second": (
        "qwen3",
        [{"kind": "hidden", "train": "gates"}, ALIGN],
        ("nha.gate=routed", "nha.gate_init=attended"),
        ("swapped", "stage_1", "final"),
    ),
}
"""Family, stages, further settings, and the rows of the evaluation besides the teacher's."""


@pytest.mark.parametrize("case", list(RUNS))
def test_a_run_exports_the_same_bytes(pico_models: dict[str, Path], text: Path, tmp_path: Path, case: str) -> None:
    """Measured, exported and verified with the base on disk; a stage that needs the whole model gets it."""
    family, stages, sets, rows = RUNS[case]
    found = {}
    for name, more in (("whole", {}), ("parts", {"layers_at_once": 1, "cached_tokens": SPAN})):
        path = write_recipe(tmp_path / f"{name}.yaml", pico_models[family], text, stages=stages, **more)
        evaluation = run(load_recipe(str(path), sets), tmp_path / name, quiet=True)
        nll = {row: evaluation[row]["nll"] for row in ("teacher", *rows)}
        shards = sorted((tmp_path / name / "export").glob("*.safetensors"))
        verification = json.loads((tmp_path / name / "verify.json").read_text())
        found[name] = nll, [(shard.name, shard.read_bytes()) for shard in shards], verification["failures"]
    assert found["whole"][0] == found["parts"][0] and len(set(found["whole"][0].values())) > 1
    assert found["whole"][1] == found["parts"][1] and found["parts"][2] == []
    assert not [path.name for path in (tmp_path / "parts").iterdir() if path.name.startswith(".")]


def test_a_streamed_model_is_the_same(pico_models: dict[str, Path], text: Path, tmp_path: Path) -> None:
    """Logits and greedy tokens, weights converted to another dtype on the way; an export of it has the same bytes."""
    nha, cpu = recipe(text).nha, torch.device("cpu")
    ids = torch.randint(0, 50, (2, 40), generator=torch.Generator().manual_seed(0))
    for name, model in pico_models.items():
        for dtype in (torch.float32, torch.bfloat16):
            scratch = tmp_path / f"{name}-{dtype}"
            scratch.mkdir()
            whole = load_student(model, nha, dtype=dtype, seed=3)
            streamed = load_streamed(model, nha, dtype=dtype, device=cpu, scratch=scratch, seed=3)
            assert is_streamed(streamed) and not is_streamed(whole)
            held = sum(parameter.numel() for parameter in streamed.parameters() if not parameter.is_meta)
            assert held == sum(t.numel() for key, t in whole.named_parameters() if ".nha." in key), name
            with torch.no_grad():
                assert torch.equal(streamed(input_ids=ids).logits, whole(input_ids=ids).logits), (name, dtype)
            options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
            assert torch.equal(streamed.generate(ids, **options), whole.generate(ids, **options)), (name, dtype)


def test_several_processes_are_refused(
    pico_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    path = write_recipe(tmp_path / "my.yaml", pico_llama, text, stages=[{"kind": "align"}], layers_at_once=1)
    with pytest.raises(InputError, match=r"runtime.layers_at_once: 1 is for one process, found 2"):
        check_engine(load_recipe(str(path)))
