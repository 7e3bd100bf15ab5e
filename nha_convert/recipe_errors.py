"""Turns what pydantic found wrong into one line per problem: place, key, what was found, what is allowed."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from .errors import nearest

Location = tuple[str | int, ...]


def submodels(annotation: Any) -> Iterator[type[BaseModel]]:
    """The settings classes inside an annotation such as `list[Annotated[A | B, ...]]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from submodels(inner)


def models_at(model: type[BaseModel], location: Location) -> list[type[BaseModel]]:
    """The settings classes whose keys may stand at a place, following pydantic's own location tuples."""
    current: list[type[BaseModel]] = [model]
    for part in location:
        if isinstance(part, int):
            continue
        tagged = [
            one
            for one in current
            if "kind" in one.model_fields and part in typing.get_args(one.model_fields["kind"].annotation)
        ]
        if tagged:
            current = tagged
            continue
        current = [
            found
            for one in current
            if part in one.model_fields
            for found in submodels(one.model_fields[part].annotation)
        ]
    return current


def key_paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key of a settings class that is not inside a list, such as `nha.slots`."""
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from key_paths(field.annotation, f"{prefix}{name}.")


def dotted(location: Location, data: Any) -> str:
    """`stages.0.tokens` from a pydantic location, leaving out the tag of a stage's kind."""
    return ".".join(str(part) for part in _plain(location, data))


def _plain(location: Location, data: Any) -> Location:
    """The location with only keys and indices that stand in the document."""
    parts: list[str | int] = []
    for part in location:
        if isinstance(data, dict) and part not in data and data.get("kind") == part:
            continue
        parts.append(part)
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            data = None
    return tuple(parts)


def line_of(node: yaml.Node | None, location: Location) -> int | None:
    """The line (from 1) of a place in a composed YAML document; the nearest enclosing one if it is absent."""
    line = None
    for part in location:
        if isinstance(node, yaml.MappingNode):
            pair = next(((k, v) for k, v in reversed(node.value) if k.value == str(part)), None)
            if pair is None:
                break
            line, node = pair[0].start_mark.line + 1, pair[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            break
    return line


def duplicate_keys(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[int, str]]:
    """(line, dotted key) of keys that stand twice in one mapping: YAML would silently keep the last."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                yield key.start_mark.line + 1, prefix + key.value
            seen.add(key.value)
            yield from duplicate_keys(value, f"{prefix}{key.value}.")
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from duplicate_keys(value, f"{prefix}{index}.")


def problem(model: type[BaseModel], error: Any, data: Any) -> str:
    """One sentence for one pydantic error: `nha.slotz: unknown key; did you mean ...`."""
    location: Location = error["loc"]
    key = dotted(location, data)
    kind, context = error["type"], error.get("ctx", {})
    found = error.get("input")
    if kind == "extra_forbidden":
        return f"{key}: {_unknown_key(model, location, data)}"
    if kind == "missing":
        return f"{key}: is missing; {_needs(model, location)}"
    if kind == "union_tag_not_found":
        return f"{key}: `kind` is missing; allowed: {context.get('expected_tags', 'align, hidden, distill, finetune')}"
    if kind == "union_tag_invalid":
        allowed = str(context["expected_tags"]).replace("'", "")
        tag = str(context["tag"])
        return f"{key}.kind: {tag!r} is unknown{_meant(tag, allowed.split(', '))}; allowed: {allowed}"
    if kind == "literal_error":
        allowed = str(context["expected"]).replace("'", "").replace(" or ", ", ")
        return f"{key}: found {found!r}{_meant(str(found), allowed.split(', '))}; allowed: {allowed}"
    if kind == "value_error":
        return f"{key}: {context['error']}" if key else str(context["error"])
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        names = sorted({name for one in models_at(model, location) for name in one.model_fields})
        return f"{key}: a mapping with the keys {', '.join(names)} is needed, found {found!r}"
    return f"{key}: {_allowed(kind, context, error['msg'])} is needed, found {found!r}"


def _allowed(kind: str, context: dict[str, Any], message: str) -> str:
    """What would have been right, in words, for pydantic's errors about one value."""
    limits = {"greater_than_equal": "ge", "greater_than": "gt", "less_than_equal": "le", "less_than": "lt"}
    if kind in limits:
        sign = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}[limits[kind]]
        return f"a number {sign} {context[limits[kind]]}"
    plain = {
        "too_short": f"a list of at least {context.get('min_length')} entries",
        "string_too_short": "a name that is not empty",
        "finite_number": "a finite number",
        "list_type": "a list",
        "string_type": "text",
        "bool_type": "true or false",
        "string_pattern_mismatch": f"text of the form {context.get('pattern')}",
    }
    if kind in plain:
        return plain[kind]
    if kind.startswith("int_"):
        return "an integer"
    return "a number" if kind.startswith("float_") else message.removeprefix("Input should be ")


def _meant(name: str, options: list[str]) -> str:
    close = nearest(name, options)
    return f", did you mean `{close}`?" if close else ""


def _unknown_key(model: type[BaseModel], location: Location, data: Any) -> str:
    name, prefix = str(location[-1]), dotted(location[:-1], data)
    siblings = [field for one in models_at(model, location[:-1]) for field in one.model_fields]
    close = nearest(name, siblings)
    if close:
        close = f"{prefix}.{close}" if prefix else close
    else:
        elsewhere = list(key_paths(model))
        close = next((path for path in elsewhere if path.split(".")[-1] == name), None) or nearest(name, elsewhere)
    hint = f", did you mean `{close}`?" if close else ""
    return f"unknown key{hint}; allowed here: {', '.join(siblings)}"


def _needs(model: type[BaseModel], location: Location) -> str:
    examples = {
        "model": "with a Hub id, a model folder, or `embedded`",
        "data": "such as `data: {sources: [{source: stdlib}]}`",
        "sources": "such as `sources: [{source: stdlib}]`",
        "source": "with one of stdlib, recall, text, dataset, chat",
        "stages": "such as `stages: [{kind: align, tokens: 400k}]`; `stages: []` trains nothing",
        "tokens": "such as `tokens: 400k`",
    }
    return f"add it, {examples.get(str(location[-1]), 'it has no default')}"


def problems(model: type[BaseModel], error: ValidationError, data: Any) -> list[tuple[Location, str]]:
    """(place in the document, sentence) of every error."""
    return [(_plain(one["loc"], data), problem(model, one, data)) for one in error.errors(include_url=False)]
