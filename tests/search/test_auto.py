"""`auto:N` from the recipe to the exported model, in a plan, in a swap, and where it is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from needy import LAYERS, NEEDY, small_recipe
from transformers import AutoConfig
from typer.testing import CliRunner

from nha_convert import pipeline
from nha_convert.app import app
from nha_convert.errors import InputError, WorkError
from nha_convert.plan import make_plan
from nha_convert.preflight import check_inputs, preflight
from nha_convert.recipe import NHASettings, load_recipe
from nha_convert.search import auto
from nha_convert.search.record import with_chosen_layers
from nha_convert.search.request import check_swap_text, search_request
from nha_convert.swap import swap_checkpoint


def nothing(*_: Any) -> dict[str, int]:
    return {"trained_parameters": 0, "trained_base_parameters": 0}


# ---- settings ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("setting", "wanted"),
    [("auto:2", (2, "kl")), ("auto:1:recall", (1, "recall")), ("every:2", None), ([1], None)],
)
def test_what_a_setting_asks_for(setting: Any, wanted: Any) -> None:
    assert NHASettings(full_attention_layers=setting).auto == wanted


@pytest.mark.parametrize("setting", ["auto:0", "auto", "auto:", "auto:2:guess", "auto:2:kl:x", "auto:-1", "auto:1.5"])
def test_other_forms_are_refused(setting: str) -> None:
    with pytest.raises(ValueError, match="`auto:N` or `auto:N:METHOD` with N >= 1 and a METHOD of attention, alignm"):
        NHASettings(full_attention_layers=setting)


def test_layers_are_never_guessed() -> None:
    with pytest.raises(InputError, match="auto:1 is measured where a conversion begins"):
        NHASettings(full_attention_layers="auto:1").windows(4)


@pytest.mark.parametrize(("count", "layers"), [(1, [3]), (2, [1, 3]), (3, [0, 1, 3]), (4, [0, 1, 2, 3])])
def test_a_plan_counts_evenly_spaced_layers(count: int, layers: list[int]) -> None:
    assert NHASettings(full_attention_layers=f"auto:{count}").planned(4).full_attention_layers == layers


def test_layers_that_are_full_anyway_are_not_counted() -> None:
    nha = NHASettings(window=[8, "full", 8, 8], full_attention_layers="auto:1")
    assert nha.candidates(4) == {0: 8, 2: 8, 3: 8}
    assert nha.planned(4).windows(4) == [8, None, 8, None]


# ---- before a run --------------------------------------------------------------------------------
def test_more_layers_than_there_are(needy_model: Path, words: Path, tmp_path: Path) -> None:
    recipe = small_recipe(needy_model, words, "nha.full_attention_layers=auto:5")
    with pytest.raises(InputError, match="auto:5 keeps 5 layers full, but the model has 4 layers with a window"):
        preflight(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rows_longer_than_the_context(needy_model: Path, words: Path, tmp_path: Path) -> None:
    recipe = small_recipe(needy_model, words, "search.sequence_length=300")
    with pytest.raises(InputError, match="search.sequence_length: 300 is beyond the 256 positions"):
        check_inputs(recipe, tmp_path / "out")


def test_a_plan_says_that_layers_are_not_known(needy_model: Path, words: Path) -> None:
    plan = make_plan(small_recipe(needy_model, words, "nha.full_attention_layers=auto:2"), nothing)
    assert [row["attention"] for row in plan["layers"]].count("full") == 2
    assert plan["notes"][0].startswith("nha.full_attention_layers is auto:2: which layers stay full is measured when")
    named = make_plan(small_recipe(needy_model, words, "nha.full_attention_layers=[1, 3]"), nothing)
    assert {key: plan[key] for key in ("parameters", "cache")} == {key: named[key] for key in ("parameters", "cache")}


def test_a_plan_refuses_windows_beyond_a_layers_own(tmp_path: Path, pico_models: dict[str, Path], words: Path) -> None:
    """Whichever layer would be chosen: all of them are measured as NHA layers first."""
    config = AutoConfig.from_pretrained(pico_models["mistral"])
    config.sliding_window = 4
    config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="8 is more than the 4 tokens that layers 0, 1"):
        make_plan(small_recipe(tmp_path, words), nothing)


# ---- a run ---------------------------------------------------------------------------------------
def test_a_run_measures_slots_as_it_starts_them(
    needy_model: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[str] = []

    def note(_: Any, nha: NHASettings, *__: Any, **___: Any) -> None:
        starts.append(nha.gate_init)

    def stop(*_: Any, **__: Any) -> Any:
        raise WorkError("stopped")

    monkeypatch.setattr("nha_convert.search.student.calibrate_gates", note)
    monkeypatch.setattr(pipeline, "calibrate_gates", stop)
    for branch, wanted in (("window", []), ("both", ["attended"])):
        recipe = small_recipe(needy_model, words, f"search.branch={branch}", "nha.gate_init=attended")
        with pytest.raises(WorkError, match="stopped"):
            pipeline.run(recipe, tmp_path / branch, quiet=True)
        assert starts == wanted and (tmp_path / branch / "search.json").exists()


def test_a_run_and_its_resume(
    needy_model: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while it is measured and again before the first stage: the layers are found once and then kept."""
    recipe, out = small_recipe(needy_model, words), tmp_path / "run"

    def stop(*_: Any, **__: Any) -> Any:
        raise WorkError("stopped")

    with monkeypatch.context() as patched, pytest.raises(WorkError, match="stopped"):
        patched.setattr(auto, "choose_layers", stop)
        pipeline.run(recipe, out, quiet=True)
    assert load_recipe(str(out)).nha.full_attention_layers == "auto:1"
    assert not (out / "search.json").exists()

    with monkeypatch.context() as patched, pytest.raises(WorkError, match="stopped"):
        patched.setattr(pipeline, "run_stage", stop)
        pipeline.run(recipe, out, quiet=True, resume=True)
    record = json.loads((out / "search.json").read_text())
    assert record["full_attention_layers"] == [NEEDY]
    assert (record["setting"], record["method"], record["seed"], record["branch"]) == ("auto:1", "kl", 3, "window")
    assert record["tokens"] == 4 * 95 and len(record["scores"]) == LAYERS
    kept = load_recipe(str(out))
    assert kept.nha.full_attention_layers == [NEEDY]
    assert with_chosen_layers(recipe, out).nha == kept.nha

    monkeypatch.setattr(auto, "choose_layers", stop)  # what is known is not measured again
    check_inputs(recipe, out, resume=True)
    check_inputs(kept, out, resume=True)
    with pytest.raises(InputError, match="full_attention_layers is null in the folder, auto:2 now"):
        check_inputs(small_recipe(needy_model, words, "nha.full_attention_layers=auto:2"), out, resume=True)
    with pytest.raises(InputError, match="search.tokens is 384 in the folder, 192 now"):
        check_inputs(small_recipe(needy_model, words, "search.tokens=192"), out, resume=True)
    evaluation = pipeline.run(recipe, out, quiet=True, resume=True)
    assert json.loads((out / "bench.json").read_text())["decode"][0]["context"] == 64
    assert json.loads((out / "run.json").read_text())["versions"]["torch"]
    assert evaluation["settings"]["nha"]["full_attention_layers"] == [NEEDY]
    windows = AutoConfig.from_pretrained(out / "export", trust_remote_code=True).nha_windows
    assert windows == [8, 8, None, 8]
    assert load_recipe(str(out / "export" / "recipe.yaml")).nha.full_attention_layers == [NEEDY]
    assert json.loads((out / "plan.json").read_text())["layers"][NEEDY]["attention"] == "full"
    request = search_request(str(out), full=1, overrides=["search.branch=window"])
    assert request.checkpoint == out / "export" and request.recipe.data == recipe.data
    assert request.windows == {0: [8], 1: [8], 3: [8]} and request.recipe.search.branch == "window"


def test_what_cannot_be_measured_is_refused_before_anything_is_written(
    needy_model: Path, words: Path, tmp_path: Path
) -> None:
    """Its tokenizer has bytes and no words."""
    recipe = small_recipe(needy_model, words, "nha.full_attention_layers=auto:1:recall")
    with pytest.raises(InputError, match="recall needs 64 one-token words"):
        pipeline.run(recipe, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "recipe.yaml").exists()


# ---- a swap --------------------------------------------------------------------------------------
def test_a_swap_needs_text_for_it(needy_model: Path, words: Path) -> None:
    recipe = small_recipe(needy_model, words)
    with pytest.raises(InputError, match="auto:1 measures the model on text, and none was given; add --text FILE"):
        check_swap_text(recipe, str(needy_model), None)
    with pytest.raises(InputError, match="--text: no text found"):
        check_swap_text(recipe, str(needy_model), "nowhere.txt")
    named = small_recipe(needy_model, words, "nha.full_attention_layers=[1]")
    with pytest.raises(InputError, match="is read with nha.full_attention_layers=auto:N alone"):
        check_swap_text(named, str(needy_model), str(words))
    assert check_swap_text(named, "other", None).model == "other"


def test_a_swap_chooses(needy_model: Path, words: Path) -> None:
    recipe = check_swap_text(small_recipe("embedded", words), str(needy_model), str(words))
    chosen, record = auto.choose_for_swap(recipe)
    assert chosen.nha.full_attention_layers == record["full_attention_layers"] == [NEEDY]
    assert chosen.nha.windows(LAYERS) == [8, 8, None, 8]


def test_a_swap_on_the_command_line(needy_model: Path, words: Path, tmp_path: Path) -> None:
    settings = [f"--set=nha.{one}" for one in ("window=8", "slots=8", "full_attention_layers=auto:1")]
    arguments = ["swap", str(needy_model), str(tmp_path / "out"), *settings, "--set=search.tokens=384"]
    refused = CliRunner().invoke(app, arguments)
    assert isinstance(refused.exception, InputError) and not (tmp_path / "out").exists()
    result = CliRunner().invoke(app, [*arguments, "--text", str(words), "--json"])
    assert result.exit_code == 0, result.output
    assert AutoConfig.from_pretrained(tmp_path / "out").nha_windows == [8, 8, None, 8]
    report = json.loads(result.stdout)
    assert report["nha_layers"] == [0, 1, 3]
    assert json.loads((tmp_path / "out" / "search.json").read_text()) == report["search"]


@pytest.mark.parametrize("command", ["eval", "generate"])
def test_a_finished_model_has_no_layers_to_choose(command: str, needy_model: Path, tmp_path: Path) -> None:
    swap_checkpoint(needy_model, tmp_path / "out", NHASettings(slots=8, window=8), quiet=True)
    more = ["--prompt", "a"] if command == "generate" else ["--no-recall"]
    setting = "--set=nha.full_attention_layers=auto:1"
    result = CliRunner().invoke(app, [command, str(tmp_path / "out"), setting, *more])
    assert isinstance(result.exception, InputError)
    assert "auto:1 is measured where a conversion begins (run, swap)" in str(result.exception)
