"""What a published recipe says of its data: Hub ids and addresses whole, paths of this machine by their last part."""

from pathlib import Path
from typing import Any

from made_text import make_recipe

from nha_convert.publish.model_card import model_card
from nha_convert.publish.portable_recipe import hub_datasets, portable_recipe


def test_no_path_of_this_machine_travels(tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    url = "https://example.org/a/b/rows.jsonl"
    sources: list[dict[str, Any]] = [
        {"source": "chat", "path": "owner/talks", "data_files": ["part/*.jsonl"]},
        {"source": "dataset", "path": str(tmp_path / "saved")},
        {"source": "dataset", "path": url},
        {"source": "dataset", "path": "json", "data_files": [str(tmp_path / "rows.jsonl")]},
        {"source": "dataset", "path": "json", "data_files": [url]},
    ]
    recipe = make_recipe(sources, cache=str(tmp_path / "cache")).model_copy(update={"model": "embedded"})
    portable, reduced = portable_recipe(recipe)
    assert str(tmp_path) not in portable.model_dump_json() and portable.data.cache is None
    found = [(source.path, source.data_files) for source in portable.data.sources]
    assert found == [
        ("owner/talks", ["part/*.jsonl"]),
        ("saved", None),
        (url, None),
        ("json", ["rows.jsonl"]),
        ("json", [url]),
    ]
    assert reduced == ["data.sources.1.path", "data.sources.3.data_files"]
    assert hub_datasets(recipe) == ["owner/talks"]
    sizes = {"nha_windows": [8], "nha_slots": 8, "nha_sinks": 1, "nha_tau": 8.0}
    config = {"model_type": "nha_llama", "nha_slot_query_scale": True, "nha_slot_bias": False, **sizes}
    card = model_card(config, [], recipe, None)
    assert "`owner/talks` `part/*.jsonl` (conversations, split train, column messages) | 20.0%" in card
    assert str(tmp_path) not in card
