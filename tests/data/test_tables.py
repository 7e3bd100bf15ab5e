"""Every form a data set can have on disk gives the same rows, and what cannot be read is named."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, DatasetDict
from made_text import make_recipe

from nha_convert.data import texts
from nha_convert.data.sources import identity
from nha_convert.errors import InputError
from nha_convert.preflight import _text_problems
from nha_convert.recipe import SourceSettings

ROWS = [f"row {number} \N{LATIN SMALL LETTER E WITH ACUTE}" for number in range(60)]


def write(folder: Path, form: str) -> dict[str, Any]:
    """ROWS in one of the forms; the settings of a source that reads them."""
    table = Dataset.from_dict({"body": ROWS})
    path = folder / form
    if form == "saved":
        table.save_to_disk(str(path))
    elif form == "splits":
        DatasetDict({"train": Dataset.from_dict({"body": ["not these"]}), "rest": table}).save_to_disk(str(path))
        return {"path": str(path), "split": "rest"}
    elif form in ("folder", "glob", "data_files"):
        path.mkdir()
        for part in range(3):
            table.select(range(20 * part, 20 * part + 20)).to_parquet(str(path / f"{part}.parquet"))
        if form == "glob":
            return {"path": str(path / "*.parquet")}
        if form == "data_files":
            return {"path": "parquet", "data_files": [str(path / f"{part}.parquet") for part in range(3)]}
    elif form == "rows.arrow":
        table.save_to_disk(str(folder / "arrow"))
        next((folder / "arrow").glob("*.arrow")).rename(path)
    elif form == "rows.json":
        path.write_text(json.dumps([{"body": row} for row in ROWS]))
    else:
        {".jsonl": table.to_json, ".parquet": table.to_parquet, ".csv": table.to_csv, ".gz": table.to_json}[
            path.suffix
        ](str(path), **({"compression": "gzip"} if path.suffix == ".gz" else {}))
    return {"path": str(path)}


FORMS = ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.parquet", "rows.arrow", "rows.csv"]


@pytest.mark.parametrize("form", [*FORMS, "saved", "splits", "folder", "glob", "data_files"])
def test_every_form_gives_the_rows(tmp_path: Path, form: str) -> None:
    source = SourceSettings(source="dataset", column="body", **write(tmp_path, form))
    assert list(texts(source, "held_out")) == ROWS[19::20]
    assert list(texts(source, "train")) == [row for row in ROWS if row not in ROWS[19::20]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"path": "{}/none.jsonl"}, "no file '.*none.jsonl'; give a .jsonl or .parquet file"),
        ({"path": "{}/*.parquet"}, "no file '.*/\\*.parquet'"),
        ({"path": "{}/nowhere/at/all"}, "no file .*; give a .jsonl or .parquet file, a folder of them or a Hub id"),
        ({"path": "{}/empty"}, "a folder without data files"),
        ({"path": "{}/mixed"}, "of several formats \\(json, parquet\\)"),
        ({"path": "json", "data_files": ["{}/good.jsonl", "http://localhost/a.jsonl"]}, "mixes URLs and local files"),
        ({"path": "{}/good.jsonl", "revision": "main"}, "`revision` belongs to a Hub id, found 'main' for local files"),
        (
            {"path": "{}/good.jsonl", "data_files": ["b.jsonl"]},
            "`data_files` belongs to a Hub id, found .* local files",
        ),
    ],
)
def test_what_is_not_there_is_refused_before_anything(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    for name in ("good.jsonl", "mixed/a.jsonl", "mixed/b.parquet"):
        (tmp_path / name).write_text('{"text": "a"}\n')
    given = json.loads(json.dumps(given).replace("{}", str(tmp_path)))
    recipe = make_recipe([{"source": "dataset", **given}])
    (problem,) = _text_problems(recipe)
    assert problem.startswith("data.sources.0.path: ")
    with pytest.raises(InputError, match=message):
        list(texts(recipe.data.sources[0], "train"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n[1]\n', r"a.jsonl:2: an object is needed, found list"),
        ("a.jsonl", '{"text": "a"}\n{"text": "b"\n', r"a.jsonl:2: not JSON"),
        ("a.parquet", "no", "a.parquet: not a parquet file"),
        ("a.arrow", "no", "a.arrow: no readable arrow file"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        list(texts(SourceSettings(source="dataset", path=str(tmp_path / name)), "train"))


def test_a_split_that_is_not_there(tmp_path: Path) -> None:
    given = write(tmp_path, "splits") | {"split": "test", "column": "body"}
    with pytest.raises(InputError, match="has no split 'test'; allowed: train, rest"):
        list(texts(SourceSettings(source="dataset", **given), "train"))


def test_a_hub_id_that_cannot_be_reached() -> None:
    source = SourceSettings(source="dataset", path="nobody/no-such-data")
    with pytest.raises(
        InputError, match=r"dataset 'nobody/no-such-data' \(split 'train'\) is neither a local file nor"
    ):
        list(texts(source, "train"))


@pytest.mark.parametrize("streaming", [True, False])
def test_a_hub_data_set_as_it_comes_or_downloaded_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    """The Hub's answer is a builder; here it is one over local files."""
    given = write(tmp_path, "data_files")
    asked: list[Any] = []
    real = datasets.load_dataset_builder

    def builder(path: str, config: str, **options: Any) -> Any:
        asked.append((path, config, options))
        return real("parquet", data_files={"train": given["data_files"]}, cache_dir=str(tmp_path / "downloaded"))

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    how: dict[str, Any] = {"path": "some/rows", "config": "small", "revision": "main", "streaming": streaming}
    source = SourceSettings(source="dataset", column="body", **how)
    assert list(texts(source, "held_out")) == ROWS[19::20]
    assert asked == [("some/rows", "small", {"data_files": None, "revision": "main"})]
    assert any((tmp_path / "downloaded").rglob("*.arrow")) is not streaming
    with pytest.raises(InputError, match=r"'some/rows' \(split 'test'\) is neither .* from the Hub: .*test"):
        list(texts(source.model_copy(update={"split": "test"}), "train"))
    assert identity(source, "train") != identity(source.model_copy(update={"config": "large"}), "train")
    asked.clear()
    pinned = source.model_copy(update={"revision": "0123456789" * 4})
    assert identity(pinned, "train") != identity(source, "train") and len(asked) == 1  # a commit asks nobody


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"source": "chat"}, "`source: chat` needs `path`"),
        ({"source": "text", "path": "a", "data_files": ["b"]}, "`data_files` lists the files of a `dataset`"),
        ({"source": "chat", "path": "a", "prompt": "q"}, "`prompt` and `response` are two columns that go together"),
        ({"source": "dataset", "path": "a", "prompt": "q", "response": "r"}, "belong to `source: chat`"),
    ],
)
def test_settings_that_do_not_fit(source: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SourceSettings.model_validate(source)


def test_a_stage_names_its_sources() -> None:
    sources = [{"source": "stdlib", "name": "code"}, {"source": "recall"}]
    recipe = make_recipe(sources)
    broken = recipe.model_dump(mode="json")
    broken["stages"][0]["sources"] = ["code", "chat"]
    with pytest.raises(ValueError, match="stages.0.sources: no source .* named 'chat'; allowed: code, recall"):
        type(recipe).model_validate(broken)
