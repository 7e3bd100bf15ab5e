"""A recipe as it travels with a checkpoint: no path of the machine that ran it. Imports no torch."""

from __future__ import annotations

import re
from pathlib import Path

from ..data_settings import SourceSettings
from ..errors import InputError
from ..model_files import local_folder
from ..recipe import Recipe, dump_recipe
from ..text_sources import FORMATS, is_url

LOCAL_DATA = (*FORMATS, ".txt")


def is_local_model(model: str) -> bool:
    """Whether a recipe's model is a folder of this machine, and neither a Hub id nor the embedded teacher."""
    if model == "embedded":
        return False
    try:
        return local_folder(model) is not None
    except InputError:
        return True


def last_part(path: str) -> str:
    """The last part of a path of any system."""
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1] or path


def portable_recipe(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """The recipe with every local path reduced to its last part.

    Returns:
        the recipe, and the keys of models and data that were reduced (`output` always is).
    """
    reduced = []
    update: dict[str, object] = {"output": last_part(recipe.output)}
    if is_local_model(recipe.model):
        update["model"] = last_part(str(Path(recipe.model).expanduser().resolve()))
        reduced.append("model")
    sources = []
    for index, source in enumerate(recipe.data.sources):
        if source.path is not None and _is_local(source):
            source = source.model_copy(update={"path": last_part(source.path)})
            reduced.append(f"data.sources.{index}.path")
        if source.data_files and source.path in FORMATS.values() and not all(map(is_url, source.data_files)):
            files = [file if is_url(file) else last_part(file) for file in source.data_files]
            source = source.model_copy(update={"data_files": files})
            reduced.append(f"data.sources.{index}.data_files")
        sources.append(source)
    update["data"] = recipe.data.model_copy(update={"sources": sources, "cache": None})
    return recipe.model_copy(update=update), reduced


def _is_local(source: SourceSettings) -> bool:
    """Whether a source is read from this machine; a dataset of the form `name` or `owner/name` may be the Hub's."""
    path = str(source.path)
    if is_url(path):
        return False
    if source.source == "text" or Path(path).suffix in LOCAL_DATA:
        return True
    return path.startswith((".", "/", "~")) or "\\" in path or path.count("/") > 1 or Path(path).exists()


def hub_datasets(recipe: Recipe) -> list[str]:
    """Hub ids of the recipe's data."""
    rows = [source for source in recipe.data.sources if source.source in ("dataset", "chat")]
    elsewhere = [str(source.path) for source in rows if not _is_local(source)]
    return [path for path in elsewhere if not is_url(path) and path not in FORMATS.values()]


def portable_text(recipe: Recipe) -> str:
    """recipe.yaml as it travels; a first comment says which keys were local paths."""
    portable, reduced = portable_recipe(recipe)
    note = f"# Local paths, reduced to their last part: {', '.join(reduced)}\n" if reduced else ""
    return note + dump_recipe(portable)
