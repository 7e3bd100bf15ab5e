"""The types that settings are made of, and what they say where a value is not one. Imports no torch."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

SEARCH_METHODS = ("attention", "alignment", "kl", "restore", "recall")
"""How a layer's need of full attention can be measured (`nha_convert.search.scores`)."""
DEFAULT_METHOD = "kl"
AUTO = re.compile(rf"auto:([1-9][0-9]*)(?::({'|'.join(SEARCH_METHODS)}))?")
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}


class Settings(BaseModel):
    """Base of all settings: unknown keys are errors, values are checked again on assignment."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"a number is needed, found {str(value).lower()}")
    return value


def _tokens(value: Any) -> int:
    """A token count: an int, or a number with k, M or B (1000s): `400k`, `1.5M`."""
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?)\s*([kKmMbBgG]?)\s*", value)
        if match is None:
            raise ValueError(f"a count such as 400000, 400k, 20M or 1B is needed, found {value!r}")
        value = float(match[1].replace("_", "")) * _UNITS[match[2].lower()]
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not math.isfinite(value)
        or value != int(value)
        or value < 1
    ):
        raise ValueError(f"a count of at least 1 such as 400000, 400k or 20M is needed, found {value!r}")
    return int(value)


def _one_window(value: Any) -> int | str:
    if value == "full":
        return "full"
    if isinstance(value, str) and value.strip().isdigit():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(
            f"an integer >= 0, `full`, or a list of these with one entry per layer is needed, found {value!r}; "
            "0 keeps no exact tokens, 64 is the default"
        )
    return value


def _window(value: Any) -> int | str | list[int | str]:
    if isinstance(value, list):
        if not value:
            raise ValueError("a list of windows needs one entry per layer, found an empty list")
        return [_one_window(item) for item in value]
    return _one_window(value)


def _one_slots(value: Any) -> int:
    if isinstance(value, str) and value.strip().isdigit():
        value = int(value)
    if not isinstance(_number(value), int) or value < 1:
        raise ValueError(f"a number >= 1 is needed, found {value!r}; or a list of these with one entry per layer")
    return value


def _slots(value: Any) -> int | list[int]:
    if isinstance(value, list):
        if not value:
            raise ValueError("a list of slots needs one entry per layer, found an empty list")
        return [_one_slots(item) for item in value]
    return _one_slots(value)


def _full_layers(value: Any) -> list[int] | str:
    if isinstance(value, list) and all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value):
        return sorted(set(value))
    if isinstance(value, str) and re.fullmatch(r"every:[1-9][0-9]*", value):
        return value
    if isinstance(value, str) and AUTO.fullmatch(value):
        return value
    if isinstance(value, str) and value.startswith("auto"):
        raise ValueError(
            f"`auto:N` or `auto:N:METHOD` with N >= 1 and a METHOD of {', '.join(SEARCH_METHODS)} is needed, "
            f"found {value!r}; `auto:2` keeps the two layers full that lose most"
        )
    raise ValueError(f"a list of layer numbers (from 0), `every:N` or `auto:N` is needed, found {value!r}")


def device_name(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]+)?", value):
        return value
    raise ValueError(f"one of auto, cpu, mps, cuda or cuda:N is needed, found {value!r}")


def size_text(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch(r"[0-9]+(\.[0-9]+)?[KMGT]B", value):
        return value
    raise ValueError(f"a size such as 500MB or 5GB is needed, found {value!r}")


NEEDS_TEXT = ("clusters", "calibrated", "attended")
"""Starts of gates that look at what the layers see: the model has to be in memory and to run."""
START_ROWS = 32
"""Rows of text that such a start looks at, unless told otherwise."""
START_LENGTH = 1024
"""Tokens of a row above which fewer rows are read, at least one."""


def calibration_rows(length: int, rows: int) -> int:
    """How many rows of so many tokens gates start from: `nha.gate_init_rows`, fewer where rows are long."""
    return max(1, min(rows, rows * START_LENGTH // length))


PAPER_LAYER = {
    "sinks": 0,
    "gate": "independent",
    "tau": 8.0,
    "gate_init": "key",
    "slot_query_scale": False,
    "slot_bias": False,
    "slot_rotary": False,
    "mask_empty": False,
}
"""Settings of the layer as in the paper (arXiv 2510.07019) and its public code, and of its start."""
OF_GATE_INIT = ("gate_horizons", "gate_init_rows")
"""Settings of `nha` that some starts of gates read and the paper's does not."""

Count = Annotated[int, BeforeValidator(_number), Field(ge=1)]
CountFromZero = Annotated[int, BeforeValidator(_number), Field(ge=0)]
Positive = Annotated[float, BeforeValidator(_number), Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, BeforeValidator(_number), Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, BeforeValidator(_number), Field(ge=0, lt=1, allow_inf_nan=False)]
Tokens = Annotated[int, BeforeValidator(_tokens)]
Slots = Annotated[int | list[int], BeforeValidator(_slots)]
Window = Annotated[int | str | list[int | str], BeforeValidator(_window)]
FullLayers = Annotated[list[int] | str, BeforeValidator(_full_layers)]
