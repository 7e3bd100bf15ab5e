"""What can be known of a model from its files alone: family and sizes. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import InputError
from .families import FAMILIES
from .files import read_json_object

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


def is_model_name(name: str) -> bool:
    """Whether a command's argument means a model: `embedded`, a folder with a config.json, or the form of a Hub id."""
    path = Path(name).expanduser()
    if name == "embedded" or path.is_dir():
        return name == "embedded" or not (path / "recipe.yaml").is_file()
    return bool(_HUB_ID.fullmatch(name)) and path.suffix not in (".yaml", ".yml") and not path.is_file()


def local_folder(model: str) -> Path | None:
    """The folder of a model that is on this disk (`embedded` included); None for a Hub id.

    Raises:
        InputError: neither a folder nor the form of a Hub id, or a folder without config.json.
    """
    from .recipe import embedded_teacher

    path = embedded_teacher() if model == "embedded" else Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"{path}: holds no config.json, so it is no model folder; name the folder that has one")
        return path
    if model != "embedded" and _HUB_ID.fullmatch(model):
        return None
    raise InputError(
        f"{path}: no such model folder; give a folder with config.json, a Hub id such as Qwen/Qwen3-0.6B, or `embedded`"
    )


def read_config(model: str) -> dict[str, Any]:
    """A model's config.json: from its folder, the Hub's local cache, or (config.json only) the Hub.

    Raises:
        InputError: it cannot be found or read.
    """
    folder = local_folder(model)
    path = folder / "config.json" if folder else _hub_config(model)
    return read_json_object(path)


def _hub_config(model: str) -> Path:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(model, "config.json")
    if isinstance(cached, str):
        return Path(cached)
    try:
        return Path(hf_hub_download(model, "config.json"))
    except Exception as error:  # the Hub client raises many unrelated classes; each means: not to be had
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{model}: no such folder, and the Hub gave no config.json ({type(error).__name__}: {reason}); "
            f"check the name, log in for a gated model (`hf auth login`), or fetch it first: `hf download {model}`"
        ) from error


def family_of(model: str) -> str:
    """The model's `model_type`, one of `FAMILIES`.

    Raises:
        InputError: the model cannot be found, is converted already, or is of another family.
    """
    return check_family(model, read_config(model))


def check_family(model: str, config: dict[str, Any]) -> str:
    """`family_of` for a config that was read already."""
    family = str(config.get("model_type", "none"))
    if family in FAMILIES:
        return family
    if family.startswith("nha_"):
        raise InputError(f"{model}: is an NHA model already (model_type {family}); name the model it was made from")
    supported = ", ".join(f"{name} ({known.models})" for name, known in FAMILIES.items())
    raise InputError(
        f"{model}: models of type {family} cannot be converted; supported: {supported}; "
        "choose a model of one of these families"
    )


def check_windows(model: str, config: Mapping[str, Any], windows: Sequence[int | None]) -> None:
    """Refuse NHA windows that reach farther than the layer's own attention does.

    Args:
        config: content of config.json.
        windows: of each layer; None stays full.
    Raises:
        InputError: a layer is sliding-window attention, and its NHA window would be larger.
    """
    own = FAMILIES[str(config["model_type"])].sliding_windows(config)
    wide = [layer for layer, (ours, theirs) in enumerate(zip(windows, own)) if ours and theirs and ours > theirs]
    if wide:
        raise InputError(
            f"nha.window: {windows[wide[0]]} is more than the {own[wide[0]]} tokens that layers "
            f"{', '.join(map(str, wide))} of {model} see (sliding_window in config.json); "
            f"set it to at most {own[wide[0]]} there, or keep these layers with nha.full_attention_layers"
        )
