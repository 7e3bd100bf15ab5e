"""`search --slots`: layers share out slots by what each gains, for the same cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from needy import LAYERS, NEEDY, small_recipe
from typer.testing import CliRunner

from nha_convert.app import app
from nha_convert.errors import InputError
from nha_convert.recipe import dump_recipe, load_recipe
from nha_convert.search.request import search_request
from nha_convert.search.slot_counts import find_slots
from nha_convert.search.tables import markdown
from nha_convert.settings import NHASettings
from nha_convert.swap import swap_checkpoint


@pytest.fixture
def recipe_file(needy_model: Path, words: Path, tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(dump_recipe(small_recipe(needy_model, words, "nha.full_attention_layers=[]")))
    return path


def ask(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["search", *arguments])


def test_slots_are_shared_out(recipe_file: Path, tmp_path: Path) -> None:
    result = ask(str(recipe_file), "--slots", "16,2,4", "--json", "--out", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    choice = found["choice"]
    assert set(choice["slots"]) <= {2, 4, 16}
    assert len(set(choice["slots"])) > 1, "layers do not gain alike"
    uniform = {point["choice"]: point for point in found["curve"]}
    assert list(uniform) == ["2 each", "4 each", "16 each"]
    assert uniform["4 each"]["slots"] == [4] * LAYERS
    assert uniform["4 each"]["bytes"] < choice["bytes"] < uniform["16 each"]["bytes"], "eight each is the budget"
    assert choice["loss"] < uniform["4 each"]["loss"]
    assert choice["loss"] == pytest.approx(
        sum(found["losses"][str(layer)][str(count)] for layer, count in enumerate(choice["slots"]))
    )
    assert all(point["kl"] > 0 for point in uniform.values())
    assert json.loads((tmp_path / "out" / "search.json").read_text()) == found
    page = (tmp_path / "out" / "search.md").read_text()
    assert page == markdown(found)
    assert "| layer | slots 2 | slots 4 | slots 16 |" in page
    assert page.startswith("# Which slots: ") and "gates started `attended`, untrained" in page
    slots = load_recipe(str(recipe_file), [found["setting"]]).nha.slots
    assert slots == choice["slots"]


def test_the_cache_of_the_recipes_own_slots_is_used_up(recipe_file: Path) -> None:
    """Within it, and no layer could get its next better count."""
    overrides = ["nha.slots=[4,8,8,16]", "nha.window=[8,8,16,8]", "nha.gate_init=spread"]
    request = search_request(str(recipe_file), slots="2,8,32", method="alignment", overrides=overrides)
    found = find_slots(request)
    assert found["gate_init"] == "attended", "a start that reads no text tells nothing of slots"
    sizes, nha, windows = request.sizes, request.recipe.nha, [8, 8, 16, 8]
    own = sum(sizes.nha_cache_bytes(nha, count, w, 4) for count, w in zip([4, 8, 8, 16], windows))
    counts, losses = found["choice"]["slots"], found["losses"]
    assert found["choice"]["bytes"] == sum(sizes.nha_cache_bytes(nha, c, w, 4) for c, w in zip(counts, windows)) <= own
    for layer, count in enumerate(counts):
        for more in (one for one in (2, 8, 32) if one > count):
            if losses[str(layer)][str(more)] < losses[str(layer)][str(count)]:
                step = [sizes.nha_cache_bytes(nha, one, windows[layer], 4) for one in (count, more)]
                assert found["choice"]["bytes"] + step[1] - step[0] > own


@pytest.mark.parametrize("method", ["kl", "restore"])
def test_what_a_method_measures_of_a_count(recipe_file: Path, method: str) -> None:
    """The layer that needs distant tokens costs most, whatever its count; restored, it does not give all back."""
    found = find_slots(search_request(str(recipe_file), slots="2,16", method=method))
    assert found["method"] == method
    losses = {int(layer): row for layer, row in found["losses"].items()}
    assert list(losses) == list(range(LAYERS))
    for point, count in zip(found["curve"], ("2", "16"), strict=True):
        assert point["choice"] == f"{count} each"
        assert max(losses, key=lambda layer: losses[layer][count]) == NEEDY
        assert losses[NEEDY][count] > 0
        assert method == "kl" or losses[NEEDY][count] < point["kl"]


def test_recall_is_given_slots() -> None:
    """In the embedded teacher one layer recalls: it is the one that loses answers, and it gets the slots."""
    overrides = ["nha.window=32", "nha.sinks=0", "nha.full_attention_layers=[]", "runtime.threads=1"]
    overrides += ["nha.slots=20", "stages.align.sequence_length=128", "search.sequence_length=256", "search.tokens=4k"]
    found = find_slots(search_request("demo", slots="4,64", method="recall", overrides=overrides))
    losses = {int(layer): row for layer, row in found["losses"].items()}
    assert max(losses, key=lambda layer: losses[layer]["4"]) == 1
    assert losses[1]["64"] < losses[1]["4"]
    assert found["choice"]["slots"] == [4, 64, 4, 4]


def test_a_budget_and_a_layer_that_stays_full(recipe_file: Path) -> None:
    options: dict[str, Any] = {"slots": "2,16", "context": 1000, "overrides": ["nha.full_attention_layers=[0]"]}
    found = find_slots(search_request(str(recipe_file), memory="100%", **options))
    least = {int(layer): int(min(row, key=row.get)) for layer, row in found["losses"].items()}  # nothing limits it
    assert found["choice"]["slots"] == ["full", least[1], least[2], least[3]]
    assert found["setting"] == f"nha.slots=[8,{least[1]},{least[2]},{least[3]}]"
    assert "| full, 16 x3 |" in markdown(found), "16 each"
    with pytest.raises(InputError, match="--memory: 2 slots in every layer that is converted, .* --slots"):
        search_request(str(recipe_file), memory="25.5%", **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"slots": "8"}, "at least two numbers such as 16,64,256 are needed, found '8'"),
        ({"slots": "8,full"}, "at least two numbers .* found '8,full'"),
        ({"slots": "0,8"}, "at least two numbers"),
        ({"slots": "8,16", "full": 1}, "--slots 8,16: chooses slots with windows as they are; leave --full out"),
        ({"slots": "8,16", "windows": "8"}, "leave --windows out"),
        ({"slots": "8,16", "method": "attention"}, "attention looks at the teacher alone"),
        ({"slots": "8,16", "overrides": ["nha.full_attention_layers=auto:1"]}, "choose these layers first"),
        ({"slots": "8,16", "overrides": ["nha.full_attention_layers=every:1"]}, "every layer of .* stays full"),
        ({"slots": "8,16", "overrides": ["nha.window=full"]}, "every layer of .* stays full"),
        ({"slots": "8,16", "overrides": ["nha.window=95"]}, "nha.window: rows of 96 tokens fit into a window of 95"),
        ({"slots": "8,16", "overrides": ["search.branch=window"]}, "leave --set search.branch out"),
        ({"slots": "8,9999"}, "gates start from 1504 tokens, fewer than 9999"),
        ({"slots": "16,32"}, "16 slots in every layer take .* nha.slots = 8 takes .* name a smaller count"),
    ],
)
def test_refusals_of_slots(options: dict[str, Any], said: str, recipe_file: Path) -> None:
    with pytest.raises(InputError, match=said):
        search_request(str(recipe_file), **options)


def test_a_finished_model_has_its_slots(needy_model: Path, tmp_path: Path) -> None:
    swap_checkpoint(needy_model, tmp_path / "model", NHASettings(slots=8, window=8, sinks=1), quiet=True)
    with pytest.raises(InputError, match="is finished, .* name the recipe or the base model"):
        search_request(str(tmp_path / "model"), slots="8,16")
