"""Costs beside the teacher: caches that are filled instead of read, turns, what is left out, how it is written."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from nha_convert import pipeline
from nha_convert.bench_checkpoint import bench_models
from nha_convert.convert import load_student
from nha_convert.evaluate import benchmark
from nha_convert.evaluate.benchmark import cache_bytes, filled_cache, measure, prefill, summary
from nha_convert.evaluate.benchmark_table import bench_notes, byte_text, decode_rows, prefill_rows
from nha_convert.modeling.attention_nha import teacher_mode
from nha_convert.recipe import load_recipe
from nha_convert.settings import EvaluateSettings, NHASettings

SMALL: dict[str, Any] = {"benchmark_contexts": [40, 700], "benchmark_prefill": [32, 64], "benchmark_repeats": 4}


@pytest.fixture(scope="module")
def student(pico_llama: Path) -> Any:
    """One NHA layer, one full one."""
    return load_student(pico_llama, NHASettings(window=[8, "full"], slots=4, sinks=2)).eval()


def read(model: Any, tokens: int) -> Any:
    """A cache that was read token by token in one call."""
    return prefill(model, torch.arange(tokens)[None] % 200, tokens)


@pytest.mark.parametrize("tokens", [5, 64, 300])
@torch.inference_mode()
def test_a_filled_cache_is_as_large_as_one_that_was_read(student: Any, tokens: int) -> None:
    for _ in range(2):
        filled, wanted = filled_cache(student, tokens), read(student, tokens)
        assert cache_bytes(filled) == cache_bytes(wanted)
        assert [layer.get_seq_length() for layer in filled.layers] == [tokens] * 2
    state = filled.layers[0].state
    assert state is not None and state.seen.tolist() == [tokens]
    assert (state.slot_k.abs().sum() > 0) == (tokens > 10)  # window and sinks hold the first ten
    with teacher_mode(student):
        teachers = filled_cache(student, tokens)
        assert cache_bytes(teachers) == cache_bytes(read(student, tokens)) == 2 * 2 * 2 * 16 * 4 * tokens
        # k and v, layers, key heads, head_dim, bytes


@torch.inference_mode()
def test_the_step_after_a_filled_cache_stands_at_its_position(student: Any) -> None:
    cache = filled_cache(student, 300)
    positions: list[int] = []
    hook = student.model.rotary_emb.register_forward_pre_hook(
        lambda _, args, kwargs: positions.extend((kwargs.get("position_ids", args[-1])).flatten().tolist()),
        with_kwargs=True,
    )
    student(torch.zeros(1, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
    hook.remove()
    assert positions == [300]
    assert [layer.get_seq_length() for layer in cache.layers] == [301] * 2


@torch.inference_mode()
def test_a_sliding_layer_keeps_its_window_alone() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = MistralForCausalLM(MistralConfig(vocab_size=64, num_hidden_layers=1, sliding_window=20, **sizes)).eval()
    assert cache_bytes(filled_cache(model, 500)) == cache_bytes(read_small(model, 500)) == 2 * 16 * 4 * 19


def read_small(model: Any, tokens: int) -> Any:
    return prefill(model, torch.arange(tokens)[None] % 64, tokens)


def test_teacher_and_student_by_turns(student: Any) -> None:
    training = student.training
    said: list[str] = []
    result = measure(student, EvaluateSettings(**SMALL), say=said.append)
    assert [row["context"] for row in result["decode"]] == [40, 700]
    assert [row["tokens"] for row in result["prefill"]] == [32, 64]
    assert result["left_out"] == [] and len(said) == 4
    for row in result["decode"]:
        for key in ("teacher", "student", "ratio"):
            assert 0 < row[key]["low"] <= row[key]["median"] <= row[key]["high"] and row[key]["runs"] == 4
    sizes = [row["cache_bytes"] for row in result["decode"]]
    assert sizes[1]["teacher"] - sizes[0]["teacher"] == 660 * 512  # both layers grow
    assert sizes[1]["student"] - sizes[0]["student"] == 660 * 256  # only the full one does
    assert student.training == training
    assert "working_bytes" not in result["decode"][0]  # a CPU does not count them


def test_a_teacher_of_its_own(student: Any, pico_llama: Path) -> None:
    calls = []
    teacher = AutoModelForCausalLM.from_pretrained(pico_llama).eval()
    hook = teacher.register_forward_hook(lambda *_: calls.append(1))
    settings = EvaluateSettings(benchmark_contexts=[40], benchmark_prefill=[], benchmark_repeats=3)
    result = bench_models(student, settings, teacher=teacher, name="pico")
    hook.remove()
    assert len(calls) == 1 + benchmark.WARM_UP + 3
    assert result["teacher"] == "pico" and result["prefill"] == []
    json.dumps(result)


def test_what_takes_too_long_is_cut_or_left_out(student: Any) -> None:
    settings = EvaluateSettings(**SMALL | {"benchmark_repeats": 50, "benchmark_seconds": 1e-6})
    result = measure(student, settings)
    assert [row["ratio"]["runs"] for row in result["decode"]] == [benchmark.LEAST_TURNS] * 2
    assert [row["tokens"] for row in result["prefill"]] == [32]
    (out,) = result["left_out"]
    assert (out["what"], out["context"]) == ("prefill", 64) and "evaluate.benchmark_seconds 1e-06" in out["reason"]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: not enough memory")]
)
def test_too_little_memory_leaves_a_context_out(
    student: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    whole = benchmark.measure_decode

    def some(models: Any, context: int, settings: EvaluateSettings) -> dict[str, Any]:
        if context > 40:
            raise error
        return whole(models, context, settings)

    monkeypatch.setattr(benchmark, "measure_decode", some)
    result = measure(student, EvaluateSettings(**SMALL))
    assert [row["context"] for row in result["decode"]] == [40]
    assert result["left_out"] == [{"what": "decode", "context": 700, "reason": "too little memory"}]


def test_other_errors_are_not_swallowed(student: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> dict[str, Any]:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(benchmark, "measure_prefill", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        measure(student, EvaluateSettings(**SMALL))


def test_ratios_are_of_one_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that gets three times slower after half of the turns changes no ratio."""
    turns = iter([0.2, 0.1] * 3 + [0.6, 0.3] * 3)
    row = benchmark._turns(lambda mode: (next(turns), None), 6, 100.0)
    assert row["ratio"] == pytest.approx({"median": 2.0, "low": 2.0, "high": 2.0, "confidence": 0.96875, "runs": 6})
    assert row["teacher"]["low"] < row["teacher"]["median"] < row["teacher"]["high"]


def test_summary_and_timed() -> None:
    def interval(runs: int) -> list[float]:
        found = summary(list(range(1, runs + 1))[::-1])
        assert found["median"] == (runs + 1) / 2 and found["runs"] == runs
        return [found["low"], found["high"], round(found["confidence"], 4)]

    # of a binomial of 1/2, worked out: from 6 runs on there is a 95 % interval, from 9 on without the outermost runs
    assert [interval(runs) for runs in (1, 3, 5, 6)] == [[1, 1, 0.0], [1, 3, 0.75], [1, 5, 0.9375], [1, 6, 0.9688]]
    assert [interval(runs) for runs in (8, 9, 15)] == [[1, 8, 0.9922], [2, 8, 0.9609], [4, 12, 0.9648]]
    assert interval(20) == [6, 15, 0.9586]
    many = interval(3000)  # beyond what a float holds; a normal distribution has 1500 -+ 1.96 sqrt(3000) / 2
    assert many[:2] == [1446, 1555] and 0.95 <= many[2] < 0.955
    assert benchmark.timed(lambda: time.sleep(0.02)) >= 0.02


def test_growth_of_prefills_is_foreseen() -> None:
    """Between linear, for want of a second length, and quadratic."""
    settings = EvaluateSettings(benchmark_seconds=20)

    def row(tokens: int, seconds: float) -> dict[str, Any]:
        return {"tokens": tokens} | {mode: {"median": seconds / 2} for mode in ("teacher", "student")}

    assert benchmark._expected([], 10**9, settings) is None
    assert benchmark._expected([row(1000, 1.0)], 3000, settings) is None  # 6 turns of 3 s
    assert "about 24 s" in str(benchmark._expected([row(1000, 1.0)], 4000, settings))
    assert "about 96 s" in str(benchmark._expected([row(1000, 1.0), row(2000, 4.0)], 4000, settings))
    assert "about 48 s" in str(benchmark._expected([row(1000, 4.0), row(2000, 4.0)], 4000, settings))


def test_tables(student: Any) -> None:
    result = bench_models(student, EvaluateSettings(**SMALL), quiet=True)
    rows = decode_rows(result)
    assert [row[0] for row in rows] == ["40", "700"]
    assert rows[1][4] == "358 kB" and rows[1][6].endswith("x")
    assert [row[0] for row in prefill_rows(result)] == ["32", "64"]
    notes = " ".join(bench_notes(result))
    assert "Beyond the model's 512 positions, and so for time and memory alone: 700." in notes
    assert "the student's own weights in teacher mode" in notes
    assert [byte_text(number) for number in (12, 4068000, 999_600, 1.5e12)] == ["12 B", "4.07 MB", "1000 kB", "1500 GB"]


def test_an_accelerator_is_waited_for_and_its_memory_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CUDA device is asked, in which order; the device itself is not needed."""
    asked: list[str] = []
    allocated = {"memory_allocated": 700, "max_memory_allocated": 1000}
    for name, answer in allocated.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: asked.append("reset"))
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda _: asked.append("wait"))
    device = torch.device("cuda", 0)
    with benchmark._working_memory(device) as peak:
        benchmark.timed(lambda: asked.append("work"), device)
    assert asked == ["reset", "wait", "work", "wait"]
    assert peak() == 300
    turns = benchmark._turns(lambda mode: (1.0, 300 if mode == "student" else 400), 3, 100.0)
    assert turns["working_bytes"] == {"teacher": 400, "student": 300}
    benchmark.timed(lambda: None, torch.device("cpu"))
    assert asked.count("wait") == 2


def test_a_run_times_its_model_once(student: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not at all where it is told not to, or where every step would read the base model from disk."""
    job = pipeline.Job.__new__(pipeline.Job)
    job.out, job.quiet, job.recipe = tmp_path, True, load_recipe("demo", ["evaluate.benchmark=false"])
    job._benchmark(student)
    job.recipe = load_recipe("demo", ["evaluate.benchmark_contexts=[40]", "evaluate.benchmark_prefill=[]"])
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "is_streamed", lambda _: True)
        job._benchmark(student)
    assert list(tmp_path.iterdir()) == []
    job._benchmark(student)
    assert json.loads((tmp_path / "bench.json").read_text())["decode"][0]["context"] == 40
    (tmp_path / "bench.json").write_text("{}")
    job._benchmark(student)
    assert (tmp_path / "bench.json").read_text() == "{}"
