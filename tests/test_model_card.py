"""The model card: metadata that the Hub reads, licence, data, training, and no path of the machine."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from nha_convert.publish.base_model import carry_licence, read_base_model
from nha_convert.publish.model_card import model_card
from nha_convert.publish.portable_recipe import portable_text
from nha_convert.recipe import Recipe, load_recipe, parse_recipe

CONFIG: dict[str, Any] = {
    "model_type": "nha_llama",
    "nha_windows": [None, 16, "full"],
    "nha_slots": 8,
    "nha_sinks": 2,
    "nha_tau": 8.0,
    "nha_slot_query_scale": True,
    "nha_slot_bias": False,
}
EVALUATION = {
    "teacher": {"nll": 2.0},
    "final": {"nll": 2.125, "kl": 0.1, "top1": 0.9, "memory_recovery": 0.5},
    "memory_recovery": {"final": 0.5},
}


def recipe(folder: Path, model: str) -> Recipe:
    """A recipe full of local paths."""
    (folder / "private" / "texts").mkdir(parents=True, exist_ok=True)
    sources = [
        {"source": "text", "path": str(folder / "private" / "texts" / "*.txt"), "weight": 3},
        {"source": "dataset", "path": str(folder / "private" / "rows.jsonl")},
        {"source": "dataset", "path": "somebody/some-dataset"},
        {"source": "stdlib"},
    ]
    stages = [
        {"kind": "align", "tokens": 1000, "sequence_length": 64, "batch_size": 4},
        {"kind": "distill", "name": "last", "tokens": "2k", "sequence_length": 128, "batch_size": 2},
    ]
    data = {"sources": sources, "held_out_tokens": 5000}
    output = str(folder / "private" / "runs" / "mine")
    return parse_recipe(yaml.safe_dump({"model": model, "output": output, "data": data, "stages": stages}), "test")


def base_folder(folder: Path, front_matter: str | None) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    if front_matter is not None:
        (folder / "README.md").write_text(f"---\n{front_matter}\n---\n# Base\n", encoding="utf-8")
    return folder


def metadata(card: str) -> dict[str, Any]:
    """As the Hub client reads it."""
    found: dict[str, Any] = ModelCard(card).data.to_dict()
    return found


def test_no_local_path_travels(tmp_path: Path) -> None:
    folder = base_folder(tmp_path / "private" / "models" / "my-base", None)
    settings = recipe(tmp_path, str(folder))
    card = model_card(CONFIG, [], settings, None, read_base_model(str(folder), folder))
    text = portable_text(settings)
    for written in (card, text):
        assert "private" not in written and str(tmp_path) not in written
    assert text in card and "Made from `my-base`, a local folder." in card
    assert text.startswith("# Local paths, reduced to their last part: model, data.sources.0.path, data.sources.1.path")
    kept = parse_recipe(text, "recipe.yaml")
    assert (kept.model, kept.output) == ("my-base", "mine")
    assert [source.path for source in kept.data.sources] == ["*.txt", "rows.jsonl", "somebody/some-dataset", None]
    assert kept.stages == settings.stages and kept.nha == settings.nha
    assert "base_model" not in metadata(card)


def test_data_and_training_are_told(tmp_path: Path) -> None:
    settings = recipe(tmp_path, "somebody/base")
    base = read_base_model("somebody/base", base_folder(tmp_path / "base", "language: [en, de]\nlicense: mit"))
    card = model_card(CONFIG, [], settings, None, base)
    assert "| `*.txt` (text) | 50.0% |" in card
    assert "| `somebody/some-dataset` (dataset, split train, column text) | 16.7% |" in card
    assert "5,000 tokens were held out" in card
    assert "| align | 1,024 | 4 | 64 | 4 |" in card
    assert "| distill (last) | 2,048 | 8 | 128 | 2 |" in card
    assert "2 of 3 layers are NHA; windows in tokens, layer by layer: full, 16, full (with gates)." in card
    found = metadata(card)
    assert found["datasets"] == ["somebody/some-dataset"]
    assert found["language"] == ["en", "de", "code"]
    assert (found["base_model"], found["base_model_relation"]) == ("somebody/base", "finetune")
    assert found["pipeline_tag"] == "text-generation" and "custom_code" in found["tags"]


def test_licence_is_the_base_models(tmp_path: Path) -> None:
    front = "license: other\nlicense_name: some-licence\nlicense_link: LICENSE.txt\nunrelated: {a: 1}"
    folder = base_folder(tmp_path / "base", front)
    for name in ("LICENSE.txt", "NOTICE", "USE_POLICY.md", "license.py"):
        (folder / name).write_text(name, encoding="utf-8")
    base = read_base_model("somebody/base", folder)
    card = model_card(CONFIG, None, None, None, base)
    found = metadata(card)
    keys = ("license", "license_name", "license_link")
    assert [found[key] for key in keys] == ["other", "some-licence", "LICENSE.txt"]
    assert "unrelated" not in found
    assert "LICENSE.txt, NOTICE, USE_POLICY.md" in card
    (tmp_path / "out").mkdir()
    carry_licence(folder, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["LICENSE.txt", "NOTICE", "USE_POLICY.md"]


@pytest.mark.parametrize("front", [None, "", "a: [", "- a list", "license: ''", "license: !!python/object:os.system x"])
def test_unknown_licence_is_said_and_not_invented(front: str | None, tmp_path: Path) -> None:
    folder = base_folder(tmp_path / "base", front)
    card = model_card(CONFIG, [], load_recipe("demo"), None, read_base_model(str(folder), folder))
    assert "license" not in metadata(card)
    assert "Its licence is not stated" in card


def test_nothing_known_is_said(tmp_path: Path) -> None:
    card = model_card(CONFIG, None, None, None)
    assert "The base model is not recorded" in card and "Nothing was measured" in card
    assert "which data it saw, if any, is not recorded" in card
    assert not {"license", "base_model", "datasets", "language", "model-index"} & set(metadata(card))


def test_numbers_stand_in_the_metadata_only_if_measured(tmp_path: Path) -> None:
    base = read_base_model("somebody/base", base_folder(tmp_path / "base", None))
    measured = ModelCard(model_card(CONFIG, [], load_recipe("demo"), EVALUATION, base))
    values = {result.metric_type: result.metric_value for result in measured.data.eval_results}
    assert values == {"nll": 2.125, "kl": 0.1, "top1": 0.9}
    assert "| final | 2.1250 | +6.25 % |" in measured.content
    assert ModelCard(model_card(CONFIG, [], load_recipe("demo"), None, base)).data.eval_results is None
