"""Where a model comes from: the folder that a name means, and the files that travel with its weights."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import snapshot_download

from .errors import InputError
from .model_files import local_folder
from .weights.weight_files import INDEX, PICKLE_INDEX, PICKLES, WEIGHTS, read_index, regular_file

MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*", "USE_POLICY*"]
PICKLE_FILES = [*(pattern for pattern in MODEL_FILES if pattern != "*.safetensors"), "pytorch_model*.bin"]
OTHER_FORMATS = ["consolidated*", "original/*"]
CHAT_TEMPLATES = "additional_chat_templates"


def resolve_model(name: str, *, pickles: bool = False) -> Path:
    """The folder of a model: a local one, the embedded teacher, or a Hub id's snapshot (the local cache first).

    Args:
        pickles: take a Hub model's pickled weights where it has no safetensors.
    Raises:
        InputError: no such folder, or the Hub id is neither in the cache nor to be had.
    """
    folder = local_folder(name)
    if folder is not None:
        return folder
    wanted = [MODEL_FILES, PICKLE_FILES] if pickles else [MODEL_FILES]
    for patterns in wanted:
        try:
            snapshot = _snapshot(name, patterns, local_files_only=True)
            if not _lacks_files(snapshot, pickles):
                return snapshot
        except (OSError, ValueError):  # not in the cache
            pass
    try:
        for patterns in wanted:
            snapshot = _snapshot(name, patterns)
            if not _lacks_files(snapshot, pickles):
                return snapshot
        raise FileNotFoundError(f"{snapshot} lacks config.json or some of its safetensors")
    except Exception as error:  # the Hub client raises many unrelated classes; each means: not to be had
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        offline = (
            " HF_HUB_OFFLINE is set, so only the local cache was read;" if os.environ.get("HF_HUB_OFFLINE") else ""
        )
        raise InputError(
            f"{name}: not in the local cache and the Hub did not give it ({reason});{offline} "
            f"fetch it with `hf download {name}`, or give a local folder"
        ) from error


def _snapshot(name: str, patterns: list[str], local_files_only: bool = False) -> Path:
    return Path(
        snapshot_download(
            name, allow_patterns=patterns, ignore_patterns=OTHER_FORMATS, local_files_only=local_files_only
        )
    )


def _lacks_files(folder: Path, pickles: bool) -> bool:
    """Whether a snapshot is without its config or one of its shards (a cache may hold a part of a model)."""
    if not (folder / "config.json").is_file():
        return True
    for weights, index in ((WEIGHTS, INDEX), (PICKLES, PICKLE_INDEX))[: 2 if pickles else 1]:
        if (folder / weights).is_file():
            return False
        if (folder / index).is_file():
            return not all((folder / shard).is_file() for shard in set(read_index(folder, index).values()))
    return True


def carried_files(folder: Path) -> Iterator[str]:
    """Names of what belongs to a model besides its weights and config: tokenizer, generation config, licence.

    Raises:
        InputError: one of them is a link that leaves the folder.
    """
    for path in sorted(folder.iterdir()):
        weights = path.name == "config.json" or path.name.endswith((".index.json", ".safetensors"))
        wanted = not weights and any(path.match(pattern) for pattern in MODEL_FILES)
        if wanted and (path.is_file() or path.is_symlink()):
            regular_file(folder, path.name)
            yield path.name
    for path in sorted((folder / CHAT_TEMPLATES).glob("*.jinja")):
        name = f"{CHAT_TEMPLATES}/{path.name}"
        regular_file(folder, name)
        yield name


def carry_files(folder: Path, work: Path) -> None:
    """Copy `carried_files` of a model's folder."""
    for name in carried_files(folder):
        (work / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / name, work / name)
