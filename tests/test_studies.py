"""What the studies' tables and the acceptance lines of fidelity say of given rows."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from nha_convert.plan import model_dimensions
from nha_convert.recipe import Recipe
from tools import acceptance_fidelity as fidelity
from tools import readme, study_memory, study_quarter, study_training


def memory_row(teacher: str, window: str, recovery: float, gains: list[float]) -> dict[str, Any]:
    final = {"nll": 4.04, "recall": {"64": 0.75}, "recovery": recovery, "interval": [recovery - 0.1, recovery + 0.1]}
    row = {
        "teacher": teacher,
        "window": window,
        "protocol": "short",
        "seed": 0,
        "tokens": 1_000_000,
        "teacher_model": {"nll": 4.0, "recall": {"64": 1.0}},
        "swapped": {**final, "recovery": 0.5},
        "aligned": {**final, "recovery": 0.6},
        "final": final,
        "layers": [
            {"layer": layer, "nll_gain": gain, "interval": [gain - 0.01, gain + 0.01]}
            for layer, gain in enumerate(gains)
        ],
    }
    if window == "random":
        values = {"0": 4.5, "32": 4.2, "64": 4.1, "256": 4.05, "full": 4.01}
        row["at"] = {size: {"nll": value, "interval": [value - 0.1, value + 0.1]} for size, value in values.items()}
    return row


@pytest.fixture
def studies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(fidelity, "STUDIES", tmp_path)
    return tmp_path


def test_the_memory_line_needs_every_run_and_every_layer(studies: Path) -> None:
    rows = [memory_row(teacher, window, 0.9, [0.1, 0.02]) for teacher in ("a", "b") for window in ("32", "64")]
    (studies / "memory.json").write_text(json.dumps(rows))
    assert fidelity.memory()["met"] and "0.900 (0.80 to 1.00), 2 of 2 layers positive" in fidelity.memory()["measured"]
    for worse in (rows[:3], [*rows[:3], memory_row("b", "64", 0.84, [0.1, 0.1])]):
        (studies / "memory.json").write_text(json.dumps(worse))
        assert not fidelity.memory()["met"]
    (studies / "memory.json").write_text(json.dumps([*rows[:3], memory_row("b", "64", 0.9, [0.1, -0.001])]))
    assert not fidelity.memory()["met"]


def test_the_memory_line_reads_the_longest_run_of_each_window(studies: Path) -> None:
    rows = [memory_row(teacher, window, 0.7, [0.1]) for teacher in ("a", "b") for window in ("32", "64")]
    longer = [{**memory_row(row["teacher"], row["window"], 0.9, [0.1]), "tokens": 2_000_000} for row in rows]
    (studies / "memory.json").write_text(json.dumps([*longer, *rows, memory_row("a", "random", 0.6, [0.1])]))
    assert fidelity.memory()["met"] and "random" not in fidelity.memory()["measured"]
    (studies / "memory.json").write_text(json.dumps([*rows, *longer[1:]]))
    assert not fidelity.memory()["met"]
    for seeds in ([*longer, {**longer[0], "seed": 1}], [{**longer[0], "seed": 1}, *longer]):
        seeds[0] = {**seeds[0], "final": {**seeds[0]["final"], "recovery": 0.8}}
        (studies / "memory.json").write_text(json.dumps(seeds))
        assert not fidelity.memory()["met"], "every seed counts"


def test_one_protocol_reaches_the_memory_line_with_every_seed(studies: Path) -> None:
    rows = [memory_row(teacher, window, 0.7, [0.1]) for teacher in ("a", "b") for window in ("32", "64")]
    better = [{**memory_row(row["teacher"], row["window"], 0.9, [0.1]), "protocol": "routed"} for row in rows]
    (studies / "memory.json").write_text(json.dumps([*rows, *better]))
    assert fidelity.memory()["met"] and "a, W 32, short, seed 0: 0.700" in fidelity.memory()["measured"]
    for worse in ([*rows, *better[1:]], [*rows, *better, {**better[0], "seed": 1, "final": rows[0]["final"]}]):
        (studies / "memory.json").write_text(json.dumps(worse))
        assert not fidelity.memory()["met"]


def test_slots_shared_out_are_told_and_do_not_count(studies: Path) -> None:
    rows = [memory_row(teacher, window, 0.9, [0.1]) for teacher in ("a", "b") for window in ("32", "64")]
    for recovery in (0.7, 0.95):
        shared = memory_row("a", "32", recovery, [0.1]) | {"protocol": "shared", "tokens": 4_000_000}
        (studies / "memory.json").write_text(json.dumps([*rows, shared]))
        found = fidelity.memory()
        assert found["met"] and f"not counted: a, W 32, shared, seed 0: {recovery:.3f}" in found["measured"]
        (studies / "memory.json").write_text(json.dumps([*rows[1:], shared]))
        assert not fidelity.memory()["met"], "it stands for no run with as many slots in every layer"


def test_the_windows_line_wants_a_falling_curve(studies: Path) -> None:
    rows = [memory_row(teacher, "random", 0.9, [0.1]) for teacher in ("a", "b")]
    (studies / "memory.json").write_text(json.dumps(rows))
    assert fidelity.windows()["met"] and "full +0.25 % of the teacher's" in fidelity.windows()["measured"]
    (studies / "memory.json").write_text(json.dumps([rows[0], {**rows[0], "protocol": "long", "tokens": 4_000_000}]))
    assert not fidelity.windows()["met"], "one teacher, twice"
    rows[1]["at"]["256"]["nll"] = 4.0
    (studies / "memory.json").write_text(json.dumps(rows))
    assert not fidelity.windows()["met"]


def layer_seed(seed: int, chosen: float, uniform: float, change: float = 0.001) -> dict[str, Any]:
    def result(nll: float, recall: float) -> dict[str, Any]:
        return {"nll": nll, "recall": {"128": {"exact_match": recall}}}

    return {
        "seed": seed,
        "choices": {"kl, window": [1], "every:4": [3]},
        "results": {
            "teacher": result(4.0, 1.0),
            "full 1": result(4.0 * (1 + change), chosen),
            "full 3": result(4.1, uniform),
        },
    }


def test_the_lines_of_layers(studies: Path) -> None:
    def write(name: str, *seeds: dict[str, Any]) -> None:
        found = {"settings": {"full": 1, "tokens": "200k"}, "seeds": seeds}
        (studies / f"{name}.json").write_text(json.dumps(found))

    write("layers", *(layer_seed(seed, 0.98, 0.2) for seed in range(3)))
    assert fidelity.auto()["met"]
    write("layers-qwen3", layer_seed(0, 0.96, 0.5))
    assert fidelity.auto()["met"]
    write("layers-qwen3", layer_seed(0, 0.5, 0.45))
    assert not fidelity.auto()["met"], "no worse than uniform on either teacher"
    write("layers", layer_seed(0, 0.5, 0.45))
    write("layers-qwen3", *(layer_seed(seed, 0.98, 0.2) for seed in range(3)))
    assert not fidelity.auto()["met"], "on the first teacher, too"


def quarter_row(teacher: str, recall: float, change: float = 0.001) -> dict[str, Any]:
    row: dict[str, Any] = {"teacher": teacher, "seed": 0, "layers": 4, "full": [1], "window": 64, "length": 1024}
    row |= {"distill": 200_000, "far": 0.0}
    row["base"] = {"nll": 4.0, "recall": {"128": [1.0, 0.9, 1.0], "1024": [0.5, 0.4, 0.6]}}
    row["final"] = {"nll": 4.0 * (1 + change), "recall": {"128": [1.0, 0.9, 1.0], "1024": [recall / 2, 0.4, 0.6]}}
    row["final"]["nll_above_teacher"] = [-0.01, 0.02]
    return row


def test_the_line_of_a_quarter(studies: Path) -> None:
    def write(*rows: dict[str, Any]) -> dict[str, Any]:
        (studies / "quarter.json").write_text(json.dumps(rows))
        return fidelity.quarter()

    assert not write(quarter_row("a", 0.98))["met"], "one teacher is not enough"
    layers = {"settings": {"full": 1, "recipe": "demo"}, "seeds": [layer_seed(0, 0.98, 0.2)]}
    (studies / "layers.json").write_text(json.dumps(layers))
    found = write(quarter_row("a", 0.98))
    said = "embedded, 1 of 4 layers full, rows of 512, alignment alone, seeds 0"
    assert found["met"] and said in found["measured"]
    (studies / "layers.json").unlink()
    found = write(quarter_row("a", 0.98), quarter_row("b", 0.96))
    said = "rows of 1024, 200k tokens of distillation, seeds 0: NLL +0.10 %, recall / teacher's 128: 1.00, 1024: 0.98"
    assert found["met"] and said in found["measured"]
    shorter = {**quarter_row("b", 0.5), "length": 512}
    assert write(quarter_row("a", 0.98), shorter, quarter_row("b", 0.96))["met"], "of the longest rows"
    less = {**quarter_row("b", 0.5), "length": 1280, "distill": 100_000}
    assert write(quarter_row("a", 0.98), less, quarter_row("b", 0.96))["met"], "of the longest training"
    farther = {**quarter_row("b", 0.96), "far": 0.5}
    found = write(quarter_row("a", 0.98), quarter_row("b", 0.5), farther)
    assert found["met"] and "(50 % of recall documents ask from afar)" in found["measured"], "of the farthest"
    assert not write(quarter_row("a", 0.98), quarter_row("b", 0.94))["met"]
    base, final = (quarter_row("b", 0.9)[name]["recall"] for name in ("base", "final"))
    again = {**quarter_row("b", 0.96), "again": {"base": base, "final": final}}
    assert not write(quarter_row("a", 0.98), again)["met"], "of both sets of prompts"
    assert not write(quarter_row("a", 0.98), quarter_row("b", 0.98, change=0.011))["met"]


def test_the_page_of_a_quarter() -> None:
    text = study_quarter.page([quarter_row("embedded", 1.0)])
    assert "| embedded | 0 | 1024 | 0 % | 0.6M | [1] of 4 | +0.10 % (-0.25 to +0.50) | 1.00, 1.00 (0.90" in text


def test_the_line_of_the_start(studies: Path) -> None:
    def write(default: dict[int, float]) -> None:
        rows = [{"teacher": "a", "method": "key", "tokens": 1_000_000, "recovery": 0.6}]
        rows += [{"teacher": "a", "method": "attended", "tokens": t, "recovery": r} for t, r in default.items()]
        (studies / "gate-init.json").write_text(json.dumps({"rows": rows}))

    write({0: 0.5, 125_000: 0.58, 250_000: 0.62})
    assert fidelity.start()["met"] and "4x fewer" in fidelity.start()["measured"]
    write({0: 0.61})
    assert fidelity.start()["met"] and "infx fewer" in fidelity.start()["measured"]
    write({250_000: 0.58, 1_000_000: 0.62})
    assert not fidelity.start()["met"]


def test_a_study_that_was_not_run_is_named(studies: Path) -> None:
    with pytest.raises((SystemExit, ValueError)):
        fidelity.memory()


@pytest.mark.parametrize("teacher, window, name", study_memory.RUNS)
def test_recipes_of_the_memory_study(teacher: str, window: str, name: str) -> None:
    protocol = study_memory.PROTOCOLS[name]
    recipe = Recipe.model_validate(study_memory.study_recipe(teacher, window, protocol, 1))
    assert recipe.seed == 1 and recipe.nha.full_attention_layers == []
    assert recipe.nha.gate_init == ("key" if protocol.paper else "attended")
    assert recipe.nha.slot_bias is recipe.nha.slot_query_scale is not protocol.paper
    drawn = study_memory.RANDOM if window == "random" else None
    assert all(stage.random_windows == drawn for stage in recipe.stages)
    assert sum(stage.tokens for stage in recipe.stages) == protocol.tokens <= 4_000_000
    assert {name for stage in recipe.stages for name in stage.sources or ()} <= {"recall"}
    layers = model_dimensions(study_memory.TEACHERS[teacher]).layers
    assert sum(recipe.nha.slots_by_layer(layers)) == study_memory.SLOTS * layers


def test_the_memory_page() -> None:
    text = study_memory.page([memory_row("embedded", "random", 0.9, [0.1, -0.1])])
    assert "| embedded | random | short | 0 | 0.500 | 0.600 | 0.900 | 0.80 to 1.00 | +1.00 % | 1 of 2 |" in text
    assert "4.0100 (3.91 to 4.11) | 4.0000 | yes |" in text
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        assert len({row.count("|") for row in table.splitlines()}) == 1, "every row of a table has as many cells"


def test_readme_tells_what_the_study_of_memory_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [memory_row("embedded", "32", 0.9, [0.1]) | {"protocol": "long"}, memory_row("qwen3", "64", 0.8, [0.1])]
    rows.append(rows[0] | {"seed": 1, "final": rows[1]["final"]})  # the table is of seed 0
    assert study_memory.readme_rows(rows) == [
        ["embedded", "32", "0.900 (0.80 to 1.00)", "–", "–"],
        ["embedded", "64", "–", "–", "–"],
        ["qwen3", "32", "–", "–", "–"],
        ["qwen3", "64", "–", "–", "–"],  # `short` is not told
    ]
    monkeypatch.setattr(readme, "README", tmp_path / "README.md")
    (tmp_path / "README.md").write_text("before\n<!-- a -->\nold\n<!-- a -->\nafter\n")
    for value in ("1", "2"):
        readme.write_block("a", ["x", "y"], [["w", value]], "Note.")
    written = "before\n<!-- a -->\n| x | y |\n| --- | --- |\n| w | 2 |\n\nNote.\n<!-- a -->\nafter\n"
    assert (tmp_path / "README.md").read_text() == written
    with pytest.raises(ValueError, match="two markers <!-- b --> are needed, found 0"):
        readme.write_block("b", ["x"], [], "")


def test_variants_of_the_training_study() -> None:
    for teacher, layers in (("embedded", 4), ("qwen3", 6)):
        for name, variant in study_training.VARIANTS.items():
            recipe = study_training.study_recipe(variant, 2, teacher)
            assert sum(stage.tokens for stage in recipe.stages) == study_training.TOKENS, name
        shared = study_training.EXTENSIONS["as many slots in all, most where it recalls"]
        slots = study_training.study_recipe(shared, 2, teacher).nha.slots
        assert isinstance(slots, list) and len(slots) == layers and sum(slots) == 64 * layers
    paper = study_training.study_recipe(study_training.EXTENSIONS["the paper's layer and start"], 0).nha
    assert not (paper.slot_query_scale or paper.slot_bias or paper.mask_empty or paper.sinks)
    row = {
        "variant": "alignment",
        "teacher": "embedded",
        "seed": 0,
        "recovery": 0.6,
        "interval": None,
        "nll": 4.0,
        "nll_window": 4.2,
        "layers": [{"nll_gain": 0.1, "interval": [0.05, 0.2]}, {"nll_gain": 0.0, "interval": None}],
        "recall": {"64": 0.5},
    }
    text = study_training.page([{**row, "teacher": "qwen3"}, row], "# Title\n\n")
    first, second = (
        f"| alignment | {teacher} | 0 | 0.600 | – | 4.0000 | 4.2000 | 1 of 2 | 0.50 |"
        for teacher in study_training.TEACHERS
    )
    assert f"{first}\n{second}" in text
