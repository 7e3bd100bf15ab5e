"""The teachers' training: sizes, budgets, and a killed run that ends where an uninterrupted one does."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from nha_convert.errors import InputError, WorkError
from nha_convert.recall_documents import RecallGenerator
from tools.teacher import train, training
from tools.teacher.run_state import FILE, LOG, RunState
from tools.teacher.sizes import SIZES, TeacherSize, new_teacher
from tools.teacher.stages import Budget, CircuitStage, Progress, Sources, Stage, TextStage, teacher_stages
from tools.teacher.training import TeacherTraining

SHIPPED = Path(__file__).resolve().parents[1] / "recipes" / "teacher"
TINY = TeacherSize(layers=1, hidden=16, intermediate=24, heads=2, kv_heads=1, head_dim=8)
STAGES: tuple[Stage, ...] = (
    CircuitStage(Budget(60, 10**9), curriculum=((1, 2),)),
    TextStage(Budget(60, 6 * 2 * 65), context=64, rows=2, recall_share=0.5, max_pairs=4, decays=True),
)


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(SHIPPED)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The measurement on few tokens and one distance."""
    monkeypatch.setattr(training, "HELD_OUT_TOKENS", 256)
    monkeypatch.setattr(training, "DISTANCES", (128,))


def fresh(tokenizer: Any, folder: Path, **options: Any) -> TeacherTraining:
    """A run of the tiny Qwen3 on made-up text."""
    text = [random.Random(i).randrange(3, 2048) for i in range(4096)]
    sources = Sources(text, RecallGenerator(tokenizer, text, seed=4), random.Random(3))
    state = RunState(folder, {"seed": options.pop("seed", 3)})
    stages = options.pop("stages", STAGES)
    model = new_teacher("qwen3", TINY, len(tokenizer), 3)
    settings: dict[str, Any] = {"bound": "tokens", "save_every": 0.0, "learning_rate": 1e-2}
    return TeacherTraining(model, stages, sources, state, **settings | options)


def run(teacher: TeacherTraining, tokenizer: Any) -> None:
    teacher.run(tokenizer, list(teacher.sources.text))


def rows(folder: Path) -> list[dict[str, Any]]:
    """The log without times."""
    lines = (folder / LOG).read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def test_default_size_is_the_shipped_teachers() -> None:
    args = train.parse([])
    model = new_teacher(args.architecture, train.teacher_size(args), 2048, args.seed)
    shipped = AutoModelForCausalLM.from_pretrained(SHIPPED)
    written = {"architectures", "transformers_version", "dtype", "_name_or_path"}
    assert {key: value for key, value in model.config.to_dict().items() if key not in written} == {
        key: value for key, value in shipped.config.to_dict().items() if key not in written
    }
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in shipped.state_dict().items()}


def test_qwen3_has_its_own_shape(tmp_path: Path) -> None:
    model = new_teacher("qwen3", SIZES["qwen3"], 2048, 1)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    shipped = AutoConfig.from_pretrained(SHIPPED)
    assert config.model_type == "qwen3" and config.head_dim != shipped.head_dim
    assert config.num_hidden_layers != shipped.num_hidden_layers and config.hidden_size != shipped.hidden_size
    assert config.num_key_value_heads < config.num_attention_heads
    assert model.model.layers[0].self_attn.q_norm.weight.shape == (config.head_dim,)


def test_weights_depend_on_the_seed_alone() -> None:
    one, again, other = (new_teacher("qwen3", TINY, 64, seed).lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_size_options_replace_the_presets() -> None:
    args = train.parse(["--architecture", "qwen3", "--layers", "3", "--head-dim", "64"])
    assert train.teacher_size(args) == TeacherSize(3, 192, 512, 6, 2, 64)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--kv-heads", "3"], "--kv-heads is 3"),
        (["--head-dim", "33"], "--head-dim is 33"),
        (["--layers", "0"], "--layers is 0"),
        (["--scale", "0"], "--scale is 0"),
        (["--learning-rate", "nan"], "--learning-rate is nan"),
        (["--tokenizer", "nowhere"], "--tokenizer nowhere"),
    ],
)
def test_bad_options_write_nothing(
    options: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, state = tmp_path / "out", tmp_path / "state"
    assert train.main([*options, "--out", str(out), "--state", str(state)]) == 2
    assert capsys.readouterr().err.startswith(named)
    assert not out.exists() and not state.exists()


def test_budgets() -> None:
    progress = Progress(step=5, tokens=300, seconds=90)
    assert Budget(minutes=3, tokens=400).share(progress, "minutes") == 0.5
    assert Budget(minutes=3, tokens=400).share(progress, "tokens") == 0.75
    whole, half = teacher_stages(), teacher_stages(0.5)
    assert [stage.budget.tokens for stage in half] == [stage.budget.tokens / 2 for stage in whole]
    assert [stage.budget.minutes for stage in half] == [10, 6, 8, 9]


@pytest.mark.parametrize("speed", [1e-6, 10.0])
def test_tokens_end_a_stage_whatever_the_speed(
    speed: float, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    """A clock that runs `speed` seconds per look changes neither the steps nor the weights."""
    clock = iter(range(10**9))
    monkeypatch.setattr("tools.teacher.training.time.monotonic", lambda: next(clock) * speed)
    teacher = fresh(tokenizer, tmp_path, stages=STAGES[1:])
    run(teacher, tokenizer)
    assert [row["step"] for row in rows(tmp_path)] == [6]
    expected = fresh(tokenizer, tmp_path / "other", stages=STAGES[1:])
    run(expected, tokenizer)
    assert same_weights(teacher, expected)


def test_minutes_end_a_stage(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    clock = iter(range(10**9))
    monkeypatch.setattr("tools.teacher.training.time.monotonic", lambda: next(clock) * 600.0)  # a step takes 10 minutes
    run(fresh(tokenizer, tmp_path, stages=STAGES[1:], bound="minutes", save_every=1e9), tokenizer)
    assert [row["step"] for row in rows(tmp_path)] == [6]


def same_weights(one: TeacherTraining, other: TeacherTraining) -> bool:
    pairs = zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("killed_at", ["circuit", "text-64", "measurement"])
def test_killed_run_ends_as_an_uninterrupted_one(
    killed_at: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    whole = fresh(tokenizer, tmp_path / "whole")
    run(whole, tokenizer)
    assert [row["phase"] for row in rows(tmp_path / "whole")][-1] == "held_out"

    killed = fresh(tokenizer, tmp_path / "killed")
    save, measure = RunState.save, training.measure

    def save_then_die(state: RunState, model: Any, optimizer: Any, sources: Any) -> None:
        save(state, model, optimizer, sources)
        if killed.stages[state.stage].name == killed_at and state.progress.step == 3:
            state.log({"phase": "lost"})
            raise Killed

    def die(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunState, "save", save_then_die)
        if killed_at == "measurement":
            patch.setattr(training, "measure", die)
        run(killed, tokenizer)
    assert training.measure is measure
    again = fresh(tokenizer, tmp_path / "killed")
    run(again, tokenizer)
    assert same_weights(whole, again)
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")


def test_kept_state_of_other_settings_is_refused(tokenizer: Any, tmp_path: Path, quick: None) -> None:
    run(fresh(tokenizer, tmp_path, stages=STAGES[1:]), tokenizer)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(InputError, match="holds a run with seed 3, asked for is 4"):
        run(fresh(tokenizer, tmp_path, stages=STAGES[1:], seed=4), tokenizer)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_damaged_state_is_named(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"PK")
    with pytest.raises(InputError, match="state.pt cannot be read"):
        run(fresh(tokenizer, tmp_path), tokenizer)


def test_unlearned_circuit_stops_the_run_and_goes_on_with_more(tokenizer: Any, tmp_path: Path, quick: None) -> None:
    short = CircuitStage(Budget(60, 3 * 64 * 5), curriculum=((1, 2),))
    with pytest.raises(WorkError, match="learned 0 of its 1 levels"):
        run(fresh(tokenizer, tmp_path, stages=[short, STAGES[1]]), tokenizer)
    again = fresh(tokenizer, tmp_path)
    run(again, tokenizer)
    whole = fresh(tokenizer, tmp_path / "whole")
    run(whole, tokenizer)
    assert same_weights(again, whole)


def test_circuit_labels_are_the_second_values(tokenizer: Any) -> None:
    teacher = fresh(tokenizer, Path("unused"))
    stage = CircuitStage(Budget(1, 1), curriculum=((3, 10),))
    input_ids, labels = stage.batch(Progress(), teacher.sources)
    assert input_ids.shape == labels.shape == (64, 1 + 4 * 3)
    for ids, marks in zip(input_ids.tolist(), labels.tolist()):
        table = dict(zip(ids[1:7:2], ids[2:7:2]))
        assert [mark for mark in marks if mark >= 0] == [table[key] for key in ids[7::2]]
        assert marks[8::2] == ids[8::2]


def test_command_writes_a_folder_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    page = Path(argparse.__file__).read_text(encoding="utf-8")
    monkeypatch.setattr(train, "stdlib_texts", lambda split: [page])
    monkeypatch.setattr(train, "teacher_stages", lambda scale, minutes: STAGES)
    out, state = tmp_path / "out", tmp_path / "state"
    size = ["--layers=1", "--hidden=16", "--intermediate=24", "--heads=2", "--kv-heads=1", "--head-dim=8"]
    options = ["--architecture=qwen3", "--budget=tokens", "--learning-rate=0.01", f"--tokenizer={SHIPPED}", *size]
    assert train.main([*options, f"--out={out}", f"--state={state}"]) == 0
    model, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert AutoTokenizer.from_pretrained(out).get_vocab() == AutoTokenizer.from_pretrained(SHIPPED).get_vocab()
    last = AutoModelForCausalLM.from_pretrained(state / "text-64").state_dict()
    assert all(torch.equal(tensor, last[name]) for name, tensor in model.state_dict().items())
    assert rows(out) == rows(state) and rows(out)[-1]["after"] == "text-64"
