"""What `search` and `swap --text` are asked for, checked before anything is loaded. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data_settings import SourceSettings
from ..errors import InputError
from ..files import read_json_object
from ..model_files import check_windows, read_config
from ..plan import Dimensions, dimensions_of
from ..quantities import BYTES
from ..recipe import Recipe, load_recipe, swap_recipe
from ..settings_types import DEFAULT_METHOD, SEARCH_METHODS
from ..text_sources import text_files
from ..weights.weight_files import check_weights
from .slot_request import check_slot_counts, slot_counts_named, windows_with_slots

WINDOWS = (64, 256, 1024)
"""Windows that are tried where none are named, if rows are at least twice as long."""
CONTEXT = 32768
READ = ("data", "evaluate", "search", "seed", "runtime")
"""Settings that a search on a finished model reads; on a base model also `nha`."""


@dataclass(frozen=True)
class SearchRequest:
    """A search.

    Attributes:
        target: as it was named.
        recipe: its text, seed, sizes and, for a base model, the model and its windows.
        checkpoint: folder of a finished NHA model; None searches the recipe's base model.
        teacher: what a finished model is compared with; None is its own backbone.
        sizes: of the model.
        method: of `SEARCH_METHODS`.
        windows: layer -> windows to try beside full attention, equally many for each; with `slots` the one that it has.
        full: layers to keep full; None leaves it to `memory`.
        memory: share of the cache of a model with full attention everywhere; None makes no choice, or, with `slots`,
            shares out the cache that the recipe's own take.
        context: tokens at which caches are compared.
        slots: counts of slots to choose among, ascending; None chooses windows.
    """

    target: str
    recipe: Recipe
    checkpoint: Path | None
    teacher: str | None
    sizes: Dimensions
    method: str
    windows: dict[int, list[int]]
    full: int | None
    memory: float | None
    context: int
    slots: tuple[int, ...] | None = None

    @property
    def full_bytes(self) -> int:
        """Cache of full attention in every layer."""
        return self.sizes.layers * self._full_layer

    @property
    def beside(self) -> int:
        """Cache of the layers that cannot be chosen: they stay full."""
        return (self.sizes.layers - len(self.windows)) * self._full_layer

    @property
    def budget(self) -> int | None:
        """Bytes for the layers that can be chosen; None where nothing was said of memory."""
        return None if self.memory is None else int(self.memory * self.full_bytes) - self.beside

    @property
    def _full_layer(self) -> int:
        return self.layer_bytes(None, 0)

    def layer_bytes(self, window: int | None, slots: int) -> int:
        """Cache of one layer; None is full attention."""
        element = BYTES[self.recipe.runtime.dtype]
        if window is None:
            return self.sizes.full_cache_bytes(self.context, element)
        return self.sizes.nha_cache_bytes(self.recipe.nha, slots, window, element)

    def slots_bytes(self, counts: Sequence[int]) -> int:
        """Cache of the layers that can be chosen, each with its window and, of `counts` by layer, its slots."""
        return sum(self.layer_bytes(own[0], counts[layer]) for layer, own in self.windows.items())


def search_request(
    target: str,
    *,
    full: int | None = None,
    memory: str | None = None,
    context: int = CONTEXT,
    method: str | None = None,
    windows: str | None = None,
    slots: str | None = None,
    text: str | None = None,
    teacher: str | None = None,
    overrides: list[str] | None = None,
) -> SearchRequest:
    """Everything that a search needs to know, from what was typed.

    Args:
        target: recipe, model, checkpoint folder or run folder.
        memory: such as `25%`.
        windows: such as `64,256,full`.
        slots: such as `16,64,256`.
        text: replaces the recipe's sources.
        overrides: `--set`.
    Raises:
        InputError: something does not fit.
    """
    _check_options(method, full, memory, windows)
    share = None if memory is None else _share(memory)
    counts = None if slots is None else slot_counts_named(slots, full, windows, method)
    checkpoint = _checkpoint(target)
    if teacher is not None and checkpoint is None:
        raise InputError(f"--teacher {teacher}: {target} is no NHA checkpoint; a base model is compared with itself")
    recipe = _recipe(target, checkpoint, overrides or [])
    recipe = recipe if text is None else with_text(recipe, text)
    model = recipe.model if checkpoint is None else str(checkpoint)
    config = read_config(model)
    if checkpoint is not None:
        check_weights(checkpoint)
        config = config | {"model_type": str(config["model_type"]).removeprefix("nha_")}
    sizes = dimensions_of(model, config)
    length = min(recipe.search.sequence_length or recipe.evaluate.sequence_length, sizes.context)
    if slots is None:
        own = _own_windows(recipe, sizes, config.get("nha_windows"))
    else:
        finished, layers = checkpoint is not None, sizes.layers
        own = windows_with_slots(
            recipe, slots, target=target, finished=finished, layers=layers, overrides=overrides or []
        )
    if full is not None and full > len(own):
        raise InputError(f"--full: {full} layers are to stay full, but {target} has {len(own)} to choose among")
    as_it_is = full is not None or counts is not None
    tried = own if as_it_is else dict.fromkeys(own, _windows(windows, length, recipe.nha.sinks))
    for window in {window for choices in tried.values() for window in choices}:
        _check_reach(model, config, list(tried), window, sizes.layers, "nha.window" if as_it_is else "--windows")
    request = SearchRequest(
        target=target,
        recipe=recipe,
        checkpoint=checkpoint,
        teacher=teacher,
        sizes=sizes,
        method=method or DEFAULT_METHOD,
        windows=tried,
        full=full,
        memory=share,
        context=context,
        slots=counts,
    )
    if counts is not None:
        check_slot_counts(request, length)
    return request


def check_swap_text(recipe: Recipe, model: str, text: str | None) -> Recipe:
    """The recipe of a swap, its model and its text in it.

    Raises:
        InputError: `auto:N` without text to measure on, or text without `auto:N`.
    """
    recipe = recipe.model_copy(update={"model": model})
    if recipe.nha.auto is None:
        if text is not None:
            raise InputError(f"--text {text}: is read with nha.full_attention_layers=auto:N alone; leave it out")
        return recipe
    if text is None:
        raise InputError(
            f"nha.full_attention_layers: {recipe.nha.full_attention_layers} measures the model on text, and none was "
            "given; add --text FILE, or name the layers"
        )
    return with_text(recipe, text)


def with_text(recipe: Recipe, path: str) -> Recipe:
    """The recipe with these files as its only source, and without stages.

    Raises:
        InputError: there is no text.
    """
    try:
        text_files(path)
    except InputError as error:
        raise InputError(str(error).replace("data.sources:", "--text:", 1)) from error
    data = recipe.data.model_copy(update={"sources": [SourceSettings(source="text", path=path)]})
    return recipe.model_copy(update={"data": data, "stages": []})


def _check_options(method: str | None, full: int | None, memory: str | None, windows: str | None) -> None:
    """Refuses options that do not go together."""
    if method is not None and method not in SEARCH_METHODS:
        raise InputError(f"--method: found {method!r}; allowed: {', '.join(SEARCH_METHODS)}")
    if full is not None and (memory is not None or windows is not None):
        other = "--memory" if memory is not None else "--windows"
        raise InputError(
            f"--full {full} keeps that many layers full with nha.window elsewhere; {other} asks for windows of each "
            "layer: give one of the two"
        )


def _share(memory: str) -> float:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*%", memory.strip())
    if match is None or not 0 < float(match[1]) <= 100:
        raise InputError(f"--memory: a share such as 25% (over 0, at most 100%) is needed, found {memory!r}")
    return float(match[1]) / 100


def _checkpoint(target: str) -> Path | None:
    """The folder of the finished NHA model that a name means; None where it means a base model or a recipe."""
    for folder in (Path(target).expanduser(), Path(target).expanduser() / "export"):
        if (folder / "config.json").is_file():
            found = str(read_json_object(folder / "config.json").get("model_type", ""))
            return folder if found.startswith("nha_") else None
    return None


def _recipe(target: str, checkpoint: Path | None, overrides: list[str]) -> Recipe:
    if checkpoint is None:
        return load_recipe(target, overrides)
    for override in overrides:
        first = override.removeprefix("~").partition("=")[0].split(".")[0]
        if first not in READ:
            raise InputError(
                f"--set {override}: on a finished model `search` reads the settings under "
                f"{', '.join(READ)} alone; windows are named with --windows"
            )
    folders = (Path(target).expanduser(), checkpoint)  # of a run folder its own recipe, which knows where text lies
    kept = next((one / "recipe.yaml" for one in folders if (one / "recipe.yaml").is_file()), None)
    recipe = swap_recipe(overrides, READ) if kept is None else load_recipe(str(kept), overrides)
    config = read_json_object(checkpoint / "config.json")
    layers = {name: config[f"nha_{name}"] for name in ("slots", "sinks")}
    layers["slot_rotary"] = config.get("nha_slot_rotary", False)  # older checkpoints do not name it
    nha = recipe.nha.model_copy(update=layers | {"full_attention_layers": []})
    named = any(one.startswith("search.branch=") for one in overrides)
    search = recipe.search if named else recipe.search.model_copy(update={"branch": "both"})  # its slots have learnt
    return recipe.model_copy(update={"nha": nha, "search": search})


def _own_windows(recipe: Recipe, sizes: Dimensions, present: list[int | str | None] | None) -> dict[int, list[int]]:
    """The window that each layer that can be NHA has as it is: of a finished model, or of the recipe.

    Args:
        present: `nha_windows` of a finished model; a layer that is full at present takes the smallest of the others.
    """
    if present is None:
        nha = recipe.nha.model_copy(update={"full_attention_layers": []})
        return {layer: [window] for layer, window in nha.candidates(sizes.layers).items()}
    numbers = [window for window in present if isinstance(window, int)]
    least = min(numbers, default=WINDOWS[0])
    return {
        layer: [window if isinstance(window, int) else least]
        for layer, window in enumerate(present)
        if window is not None
    }


def _windows(named: str | None, length: int, sinks: int) -> list[int]:
    """Windows to try, ascending; full attention is always among what can be chosen."""
    if named is None:
        found = [window for window in WINDOWS if 2 * window <= length] or [max(1, length // 4)]
        return found
    parts = [part.strip() for part in named.strip("[] ").split(",")]
    wrong = [part for part in parts if part != "full" and not part.isdigit()]
    numbers = sorted({int(part) for part in parts if part.isdigit()})
    if wrong or not numbers:
        raise InputError(f"--windows: numbers and `full` such as 64,256,full are needed, found {named!r}")
    if numbers[-1] + sinks >= length:
        raise InputError(
            f"--windows: rows of {length} tokens fit into a window of {numbers[-1]} and the sinks, so nothing can be "
            "measured of it; raise search.sequence_length or leave it out"
        )
    return numbers


def _check_reach(
    model: str, config: dict[str, object], layers: list[int], window: int, count: int, setting: str
) -> None:
    try:
        check_windows(model, config, [window if layer in layers else None for layer in range(count)])
    except InputError as error:
        raise InputError(str(error).replace("nha.window:", f"{setting}:", 1)) from error
