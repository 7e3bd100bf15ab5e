"""Loads, overrides, checks and saves recipes. Imports no torch.

A recipe is named by what is shipped (`demo`), by a YAML file, or by a model (Hub id or folder): then the
recipe of its family that is nearest in size is taken (`recipe_choice`). Every problem of a recipe is reported at once,
with its line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from .data_settings import DataSettings, SourceSettings
from .errors import InputError, nearest
from .recipe_errors import Location, duplicate_keys, line_of, problems
from .settings import (
    EvaluateSettings,
    ExportSettings,
    NHASettings,
    Recipe,
    RuntimeSettings,
    SearchSettings,
)
from .settings_types import OF_GATE_INIT, PAPER_LAYER
from .stage_settings import AlignStage, DistillStage, FinetuneStage, HiddenStage, LoraSettings, LossSettings

__all__ = [
    "AlignStage",
    "DataSettings",
    "DistillStage",
    "EvaluateSettings",
    "ExportSettings",
    "FinetuneStage",
    "HiddenStage",
    "LoraSettings",
    "LossSettings",
    "NHASettings",
    "Recipe",
    "RuntimeSettings",
    "SearchSettings",
    "SourceSettings",
    "apply_override",
    "dump_recipe",
    "embedded_teacher",
    "evaluate_settings",
    "list_recipes",
    "load_recipe",
    "parse_recipe",
    "recipe_path",
    "recipes_folder",
    "swap_recipe",
]


AT_INFERENCE = ("nha.window", "nha.full_attention_layers")
"""Settings that a finished model can change."""
_SMALLEST = "{model: embedded, data: {sources: [{source: stdlib}]}, stages: []}"


def recipes_folder() -> Path:
    """The shipped recipes: beside the package in a checkout, inside it when installed."""
    package = Path(__file__).resolve().parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def embedded_teacher() -> Path:
    """The folder of the small trained Llama that ships with this package."""
    return recipes_folder() / "teacher"


def list_recipes() -> list[str]:
    """Names of the shipped recipes, sorted."""
    return sorted(path.stem for path in recipes_folder().glob("*.yaml"))


def recipe_path(name: str) -> Path:
    """The file of a shipped recipe's name, of a run folder, or of a path.

    Raises:
        InputError: there is neither; the message names the nearest shipped recipe.
    """
    path = Path(name).expanduser()
    if (path / "recipe.yaml").is_file():
        return path / "recipe.yaml"
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if path.is_file():
            return path
        raise InputError(f"{name}: no such recipe file; shipped recipes: {', '.join(list_recipes())}")
    if name in list_recipes():
        return recipes_folder() / f"{name}.yaml"
    close = nearest(name, list_recipes())
    hint = f", did you mean `{close}`?" if close else ""
    raise InputError(
        f"{name}: no shipped recipe, recipe file, model folder or Hub id has this name{hint}; "
        f"shipped recipes: {', '.join(list_recipes())}; a model folder holds a config.json"
    )


def load_recipe(name: str, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """A checked recipe from a shipped name, a YAML file, or a model.

    Args:
        name: `demo`, `my.yaml`, a run folder, `meta-llama/Llama-3.2-1B`, `./model_folder` or `embedded`.
        overrides: `a.b=value` (value is YAML, `=` may stand inside) or `~a.b` (back to the default).
    Raises:
        InputError: nothing has this name, or the recipe is wrong; every problem at once.
    """
    from .model_files import is_model_name

    if is_model_name(name):
        from .recipe_choice import choose_for

        path = recipes_folder() / f"{choose_for(name).recipe}.yaml"
        last = Path(name).resolve().name if Path(name).is_dir() else name.rsplit("/", 1)[-1]
        return parse_recipe(
            _text(path),
            path.name,
            overrides,
            defaults={"model": name, "output": f"runs/{last}"},
        )
    path = recipe_path(name)
    if Path(name).expanduser().is_dir():
        return parse_recipe(_text(path), str(path), overrides, defaults={"output": name})
    return parse_recipe(_text(path), path.name, overrides)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error}); a recipe is a YAML file") from error


def _only(overrides: list[str], allowed: tuple[str, ...], command: str) -> None:
    """Refuses settings that a command does not read."""
    for override in overrides:
        first = override.removeprefix("~").partition("=")[0].split(".")[0]
        if first not in allowed:
            names = [f"`{one}`" for one in allowed]
            listed = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
            raise InputError(
                f"--set {override}: `{command}` reads the settings under {listed} alone; the others belong to "
                "`nha-convert run`"
            )


def swap_recipe(overrides: list[str], allowed: tuple[str, ...] = ("nha", "seed", "search")) -> Recipe:
    """A recipe without stages, all defaults but for the overrides; its text is the standard library.

    Args:
        allowed: first parts of the settings that may be overridden.
    Raises:
        InputError: an override is wrong, or names another setting.
    """
    _only(overrides, allowed, "swap")
    return parse_recipe(_SMALLEST, "--set", overrides)


def window_settings(overrides: list[str], command: str) -> NHASettings | None:
    """The windows that overrides set for a finished model; None if there are none.

    Args:
        command: named in messages.
    Raises:
        InputError: an override is wrong, or names a setting that only a new conversion can change.
    """
    for override in overrides:
        path = override.removeprefix("~").partition("=")[0]
        if path not in AT_INFERENCE:
            raise InputError(
                f"--set {override}: `{command}` changes {' and '.join(f'`{one}`' for one in AT_INFERENCE)} alone; "
                "the other settings belong to `nha-convert run` and `swap`"
            )
    return parse_recipe(_SMALLEST, "--set", overrides).nha if overrides else None


def evaluate_settings(checkpoint: Path, overrides: list[str], command: str = "eval") -> EvaluateSettings:
    """The `evaluate` settings of the recipe inside a checkpoint, or the defaults, with overrides.

    Args:
        command: named in messages.
    Raises:
        InputError: an override is wrong, or names another setting.
    """
    _only(overrides, ("evaluate",), command)
    path = checkpoint / "recipe.yaml"
    text = _text(path) if path.is_file() else _SMALLEST
    return parse_recipe(text, str(path), overrides).evaluate


def parse_recipe(
    text: str, label: str, overrides: list[str] | tuple[str, ...] = (), defaults: dict[str, Any] | None = None
) -> Recipe:
    """A checked recipe from YAML text.

    Args:
        label: the file's name in messages.
        defaults: top-level values that replace the text's own (a model given on the command line).
    Raises:
        InputError: every problem at once, one line each: `label:line: key: what; allowed: ...`.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{label}:{mark.line + 1}" if mark else label
        raise InputError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(data, dict):
        raise InputError(
            f"{label}: a mapping of settings is needed, found {type(data).__name__}; see `recipes show demo`"
        )
    twice = [f"{label}:{line}: {key}: stands twice; keep one" for line, key in duplicate_keys(node)]
    data.update(defaults or {})
    data.setdefault("output", f"runs/{Path(label).stem}")
    _make_room_for_layer(data, overrides)
    given: dict[Location, str] = {}
    for override in overrides:
        given[apply_override(data, override)] = override
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        found = [f"{_where(place, given, label, node)}: {said}" for place, said in problems(Recipe, error, data)]
        raise InputError("\n".join(twice + found)) from error
    if twice:
        raise InputError("\n".join(twice))
    return recipe


def _make_room_for_layer(data: dict[str, Any], overrides: list[str] | tuple[str, ...]) -> None:
    """Drops what the text has of the settings that an override of `nha.layer` decides; other overrides stay."""
    asked = [override for override in overrides if override.removeprefix("~").partition("=")[0] == "nha.layer"]
    nha = data.get("nha")
    if not asked or not isinstance(nha, dict):
        return
    if "paper" in (nha.get("layer"), asked[-1].partition("=")[2].strip(" '\"")):
        data["nha"] = {name: value for name, value in nha.items() if name not in (*PAPER_LAYER, *OF_GATE_INIT)}


def _where(place: Location, given: dict[Location, str], label: str, node: yaml.Node | None) -> str:
    """`--set a.b=c` if the place came from the command line, else `file.yaml:12`."""
    for path, override in reversed(list(given.items())):
        shared = min(len(path), len(place))
        if shared and path[:shared] == place[:shared]:
            return f"--set {override}"
    line = line_of(node, place)
    return f"{label}:{line}" if line else label


def apply_override(data: dict[str, Any], override: str) -> Location:
    """Applies one `a.b=value` or `~a.b` to the settings in place and returns the place it touched.

    List entries are named by number or by their `name`, `kind` or `source`: `stages.align.tokens=1M`.

    Raises:
        InputError: the text has neither form, the value is not YAML, or a list has no such entry.
    """
    removes = override.startswith("~")
    path, equals, raw = override[removes:].partition("=")
    if not path or (removes and equals) or not (removes or equals) or "" in path.split("."):
        raise InputError(f"--set {override}: the form is `a.b=value`, or `~a.b` to go back to the default")
    try:
        value = yaml.safe_load(raw) if equals else None
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"--set {override}: the value {raw!r} is not valid YAML; quote it") from error
    parts = path.split(".")
    place: list[str | int] = []
    holder: Any = data
    for depth, part in enumerate(parts):
        key = _entry(holder, part, override) if isinstance(holder, list) else part
        place.append(key)
        if depth == len(parts) - 1:
            if not removes:
                holder[key] = value
            elif isinstance(holder, list):
                del holder[int(key)]
            else:
                _known(parts, place, override)
                holder.pop(key, None)
        else:
            if isinstance(holder, dict) and holder.get(key) is None:
                if removes:
                    _known(parts, place, override)
                    break
                holder[key] = {}
            holder = holder[key]
            if not isinstance(holder, (dict, list)):
                raise InputError(
                    f"--set {override}: `{'.'.join(parts[: depth + 1])}` is {holder!r} and has no keys inside"
                )
    return tuple(place)


def _known(parts: list[str], place: list[str | int], override: str) -> None:
    """Refuses `~a.b` where no setting has this name: pydantic never sees what is removed."""
    from .recipe_errors import models_at

    models: list[Any] = [Recipe]
    for depth, part in enumerate(parts):
        if depth < len(place) and isinstance(place[depth], int):
            continue
        names = sorted({name for one in models for name in one.model_fields})
        if names and part not in names:
            close = nearest(part, names)
            prefix = ".".join(parts[:depth])
            hint = f", did you mean `{prefix + '.' if prefix else ''}{close}`?" if close else ""
            raise InputError(
                f"--set {override}: {'.'.join(parts)}: unknown key{hint}; allowed here: {', '.join(names)}"
            )
        models = [inner for one in models for inner in models_at(one, (part,))]


def _entry(entries: list[Any], part: str, override: str) -> int:
    if part.isdigit() and int(part) < len(entries):
        return int(part)
    names = [
        next((str(entry[key]) for key in ("name", "kind", "source") if entry.get(key)), "")
        if isinstance(entry, dict)
        else ""
        for entry in entries
    ]
    if names.count(part) == 1:
        return names.index(part)
    there = ", ".join(f"{index} ({name})" if name else str(index) for index, name in enumerate(names)) or "none"
    raise InputError(f"--set {override}: the list has no single entry {part!r}; entries: {there}")


def dump_recipe(recipe: Recipe) -> str:
    """The recipe with every default written out, as YAML that `load_recipe` reads back equal."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=120)
