"""What a converted model's base says of itself: its id, licence and languages. Imports no torch."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import hf_hub_download, metadata_load

from .portable_recipe import is_local_model, last_part

LICENCE_FILES = ("license", "licence", "notice", "copying", "use_policy")
LICENCE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class BaseModel:
    """A base model as a card names it.

    Attributes:
        name: Hub id, the last part of a local folder's path, or `embedded`.
        hub_id: None for a local folder or the embedded model.
        licence: those of `LICENCE_KEYS` that the front matter of its README.md has.
        languages: as that front matter says.
        licence_files: names of the files in its folder that hold licence, notice or use policy.
    """

    name: str
    hub_id: str | None
    licence: dict[str, Any] = field(default_factory=dict)
    languages: list[str] = field(default_factory=list)
    licence_files: list[str] = field(default_factory=list)


def read_base_model(name: str, folder: Path) -> BaseModel:
    """What can be known of a base model.

    Args:
        name: as a recipe names it: Hub id, folder or `embedded`.
        folder: where its files are; the README.md of a Hub id is asked of the Hub when it is not there.
    """
    local = is_local_model(name) or name == "embedded"
    said = _front_matter(folder, None if local else name)
    languages = said.get("language") or []
    return BaseModel(
        name=last_part(str(Path(name).expanduser().resolve())) if local and name != "embedded" else name,
        hub_id=None if local else name,
        licence={key: said[key] for key in LICENCE_KEYS if said.get(key)},
        languages=[str(one) for one in (languages if isinstance(languages, list) else [languages])],
        licence_files=licence_files(folder),
    )


def licence_files(folder: Path) -> list[str]:
    """Names of licence, notice and use policy files."""
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.is_file() and path.name.lower().startswith(LICENCE_FILES) and path.suffix != ".py"
    )


def carry_licence(folder: Path, work: Path) -> None:
    """Copy licence, notice and use policy files that are not there yet."""
    for name in licence_files(folder):
        if not (work / name).exists():
            shutil.copyfile(folder / name, work / name)


def _front_matter(folder: Path, hub_id: str | None) -> dict[str, Any]:
    """Metadata of the base model's README.md; empty where there is none that can be read."""
    path = folder / "README.md"
    if not path.is_file() and hub_id is not None:
        try:
            path = Path(hf_hub_download(hub_id, "README.md"))
        except Exception:  # the Hub client raises many unrelated classes; each means: no card to be had
            return {}
    if not path.is_file():
        return {}
    try:
        return metadata_load(path) or {}
    except (ValueError, yaml.YAMLError, OSError):
        return {}
