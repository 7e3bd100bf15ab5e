"""The command `search`: on a base model and on a finished one, within a budget, printed and written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from needy import LAYERS, NEEDY, small_recipe
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from nha_convert.app import app
from nha_convert.convert import load_student
from nha_convert.errors import InputError
from nha_convert.recipe import dump_recipe
from nha_convert.search.find import find_windows
from nha_convert.search.request import search_request
from nha_convert.search.tables import markdown, runs
from nha_convert.settings import NHASettings
from nha_convert.swap import swap_checkpoint

SMALL = ["search.tokens=384", "search.sequence_length=96", "runtime.device=cpu"]


@pytest.fixture
def recipe_file(needy_model: Path, words: Path, tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(dump_recipe(small_recipe(needy_model, words)))
    return path


@pytest.fixture(scope="module")
def finished(needy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A swapped model, all of whose layers have gates but the first."""
    out = tmp_path_factory.mktemp("swapped") / "model"
    settings = NHASettings(slots=8, window=[8, 8, 16, 8], sinks=1, full_attention_layers=[0])
    swap_checkpoint(needy_model, out, settings, quiet=True)
    return out


def ask(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["search", *arguments])


def test_layers_of_a_base_model(recipe_file: Path, tmp_path: Path) -> None:
    result = ask(str(recipe_file), "--full", "1", "--json", "--out", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["setting"] == f"nha.full_attention_layers=[{NEEDY}]"
    assert found["choice"]["windows"] == [8, 8, "full", 8]
    assert not found["finished"] and found["branch"] == "window"
    assert json.loads((tmp_path / "out" / "search.json").read_text()) == found
    assert (tmp_path / "out" / "search.md").read_text() == markdown(found)
    uniform = next(point for point in found["curve"] if point["choice"] == "every:4")
    assert uniform["windows"] == [8, 8, 8, "full"]
    assert uniform["bytes"] == found["choice"]["bytes"]
    assert found["choice"]["kl"] < uniform["kl"] / 3


def test_slots_are_measured_as_a_run_starts_them(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def note(_: Any, nha: NHASettings, *__: Any, **___: Any) -> None:
        asked.append(nha.gate_init)

    monkeypatch.setattr("nha_convert.search.student.calibrate_gates", note)
    for branch, start in (("window", "attended"), ("both", "spread"), ("both", "attended")):
        options = [f"search.branch={branch}", f"nha.gate_init={start}"]
        find_windows(search_request(str(recipe_file), full=1, overrides=options))
        assert asked == (["attended"] if (branch, start) == ("both", "attended") else [])


@pytest.mark.parametrize("share", [30, 55, 80, 100])
def test_windows_within_a_budget(share: int, recipe_file: Path) -> None:
    request = search_request(str(recipe_file), memory=f"{share}%", windows="4,16,64,full", context=2048)
    found = find_windows(request)
    choice = found["choice"]
    assert choice["bytes"] <= share / 100 * found["full_bytes"]
    assert choice["share"] == pytest.approx(choice["bytes"] / found["full_bytes"])
    assert set(choice["windows"]) <= {4, 16, 64, "full"}
    losses = found["losses"]
    wanted = sum(losses[str(layer)].get(str(window), 0.0) for layer, window in enumerate(choice["windows"]))
    assert choice["loss"] == pytest.approx(wanted)
    assert choice["windows"][NEEDY] == "full"
    sizes, nha = request.sizes, request.recipe.nha
    own = sum(
        sizes.full_cache_bytes(2048, 4) if window == "full" else sizes.nha_cache_bytes(nha, own, window, 4)
        for window, own in zip(choice["windows"], nha.slots_by_layer(sizes.layers))
    )
    assert choice["bytes"] == own
    NHASettings.model_validate(yaml.safe_load("{" + found["setting"].replace("nha.window=", "window: ") + "}"))


def test_the_curve_ends_at_the_teacher(recipe_file: Path) -> None:
    found = find_windows(search_request(str(recipe_file), windows="4,16", context=2048))
    greedy = [point for point in found["curve"] if point["choice"] == "greedy"]
    assert found["choice"] is None and found["setting"] is None
    assert greedy[0]["windows"] == [4] * LAYERS
    assert greedy[-1] == {
        **{"choice": "greedy", "windows": ["full"] * LAYERS, "bytes": found["full_bytes"], "share": 1.0},
        **{"loss": 0.0, "kl": pytest.approx(0.0, abs=1e-6)},
    }
    assert [point["bytes"] for point in greedy] == sorted(point["bytes"] for point in greedy)
    assert [point["kl"] for point in greedy] == sorted((point["kl"] for point in greedy), reverse=True)


def test_windows_of_a_finished_model(finished: Path, words: Path) -> None:
    """Its first layer has no gates and stays full; the line that is printed can be used."""
    options: dict[str, Any] = {"memory": "60%", "windows": "4,32", "context": 2048, "text": str(words)}
    found = find_windows(search_request(str(finished), **options, overrides=SMALL))
    assert found["finished"] and found["branch"] == "both"
    assert set(found["losses"]) == {"1", "2", "3"}
    windows = found["choice"]["windows"]
    assert windows[0] == "full" and windows[NEEDY] == "full"
    assert found["choice"]["share"] <= 0.6
    assert found["setting"] == f"nha.window=[{','.join(map(str, windows))}]"
    model = AutoModelForCausalLM.from_pretrained(finished)
    model.set_windows(windows)
    assert model.config.nha_windows == [None, *windows[1:]]


def test_the_cache_of_a_finished_model_is_counted_as_it_is(needy_model: Path, tmp_path: Path) -> None:
    """Rotated slots keep no cos and sin; a checkpoint from before there was a choice does not name them."""
    for rotary in (False, True):
        settings = NHASettings(slots=8, window=[8, 8, 16, 8], sinks=1, full_attention_layers=[0], slot_rotary=rotary)
        swap_checkpoint(needy_model, tmp_path / f"rotary-{rotary}", settings, quiet=True)
        request = search_request(str(tmp_path / f"rotary-{rotary}"), full=1, overrides=SMALL)
        assert request.recipe.nha.slot_rotary is rotary
    path = tmp_path / "rotary-False" / "config.json"
    fields = json.loads(path.read_text())
    del fields["nha_slot_rotary"], fields["nha_gate"]
    path.write_text(json.dumps(fields))
    assert not search_request(str(path.parent), full=1, overrides=SMALL).recipe.nha.slot_rotary


def test_a_finished_model_against_a_teacher(finished: Path, needy_model: Path, words: Path) -> None:
    options: dict[str, Any] = {"full": 1, "text": str(words), "overrides": SMALL}
    alone = find_windows(search_request(str(finished), **options))
    beside = find_windows(search_request(str(finished), teacher=str(needy_model), **options))
    assert alone["setting"] == beside["setting"] == "nha.window=[full,8,full,8]"
    assert alone["choice"]["kl"] == pytest.approx(beside["choice"]["kl"], rel=1e-4)


def test_what_is_printed(recipe_file: Path) -> None:
    result = ask(str(recipe_file), "--full", "1", "--method", "attention")
    assert result.exit_code == 0, result.output
    assert "share of the teacher's softmax beyond window and sinks" in result.stdout
    assert f"use it:  --set nha.full_attention_layers=[{NEEDY}]" in result.stdout
    assert ask(str(recipe_file), "--full", "1", "--quiet").stdout == ""


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "guess"}, "--method: found 'guess'; allowed: attention, alignment, kl, restore, recall"),
        ({"full": 5}, "--full: 5 layers are to stay full, but .* has 4 to choose among"),
        ({"full": 1, "memory": "25%"}, "--memory asks for windows of each layer: give one of the two"),
        ({"full": 1, "windows": "8"}, "--windows asks for windows of each layer"),
        ({"memory": "0%"}, "a share such as 25% .* is needed, found '0%'"),
        ({"memory": "2GB"}, "a share such as 25% .* is needed, found '2GB'"),
        ({"windows": "full"}, "numbers and `full` such as 64,256,full are needed, found 'full'"),
        ({"windows": "8,-1"}, "numbers and `full` .* found '8,-1'"),
        ({"windows": "95"}, "rows of 96 tokens fit into a window of 95 and the sinks"),
        ({"teacher": "embedded"}, "is no NHA checkpoint; a base model is compared with itself"),
        ({"text": "nowhere.txt"}, "--text: no text found"),
    ],
)
def test_refusals(options: dict[str, Any], said: str, recipe_file: Path) -> None:
    with pytest.raises(InputError, match=said):
        search_request(str(recipe_file), **options)


def test_refusals_of_a_finished_model(finished: Path) -> None:
    with pytest.raises(InputError, match="on a finished model `search` reads the settings under data, evaluate"):
        search_request(str(finished), overrides=["nha.window=8"])
    with pytest.raises(InputError, match="--full: 4 layers .* has 3 to choose among"):
        search_request(str(finished), full=4, overrides=SMALL)


def test_a_budget_that_nothing_fits(recipe_file: Path) -> None:
    result = ask(str(recipe_file), "--memory", "1%", "--context", "100")
    assert isinstance(result.exception, InputError)
    assert "the smallest windows take" in str(result.exception)


def test_windows_beyond_a_layers_own(tmp_path: Path, pico_models: dict[str, Path], words: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(pico_models["mistral"])
    model.config.sliding_window = 16
    model.save_pretrained(tmp_path)
    path = tmp_path / "small.yaml"
    path.write_text(dump_recipe(small_recipe(tmp_path, words)))
    with pytest.raises(InputError, match="--windows: 32 is more than the 16 tokens that layers 0, 1"):
        search_request(str(path), windows="8,32")


def test_runs_of_windows() -> None:
    assert runs([64, 64, "full", 8]) == "64 x2, full, 8"


def test_the_finished_model_of_the_tests_has_gates_where_it_says(needy_model: Path, finished: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished)
    student = load_student(needy_model, NHASettings(slots=8, window=[8, 8, 16, 8], sinks=1, full_attention_layers=[0]))
    assert model.config.nha_windows == student.config.nha_windows == [None, 8, 16, 8]
