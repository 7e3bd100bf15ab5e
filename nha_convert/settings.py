"""Every setting of a recipe, its type and its limits: one pydantic model, typos refused. Imports no torch.

`nha_convert.recipe` loads, overrides and saves recipes and re-exports these classes.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, field_validator, model_validator

from .errors import InputError

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


def _full_layers(value: Any) -> list[int] | str:
    if isinstance(value, list) and all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value):
        return sorted(set(value))
    if isinstance(value, str) and re.fullmatch(r"every:[1-9][0-9]*", value):
        return value
    if isinstance(value, str) and value.startswith("auto:"):
        raise ValueError(
            f"`auto:N` (choosing the layers by measurement) is not in this version, found {value!r}; "
            "name the layers, such as [3, 7], or use `every:4`"
        )
    raise ValueError(f"a list of layer numbers (from 0) or `every:N` is needed, found {value!r}")


def _device(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]+)?", value):
        return value
    raise ValueError(f"one of auto, cpu, mps, cuda or cuda:N is needed, found {value!r}")


def _size(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch(r"[0-9]+(\.[0-9]+)?[KMGT]B", value):
        return value
    raise ValueError(f"a size such as 500MB or 5GB is needed, found {value!r}")


Count = Annotated[int, BeforeValidator(_number), Field(ge=1)]
CountFromZero = Annotated[int, BeforeValidator(_number), Field(ge=0)]
Positive = Annotated[float, BeforeValidator(_number), Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, BeforeValidator(_number), Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, BeforeValidator(_number), Field(ge=0, lt=1, allow_inf_nan=False)]
Tokens = Annotated[int, BeforeValidator(_tokens)]
Window = Annotated[int | str | list[int | str], BeforeValidator(_window)]
FullLayers = Annotated[list[int] | str, BeforeValidator(_full_layers)]


class NHASettings(Settings):
    """What each attention layer becomes.

    Attributes:
        slots: memory slots per key/value head.
        window: exact tokens each query sees, itself included; an int, `full`, or one of these per layer.
        full_attention_layers: layers (from 0) that stay the base model's own attention; `every:N` keeps
            layers N-1, 2N-1, ...
        sinks: first tokens that stay exact for ever.
        tau: divides the gate's log-sigmoid; larger remembers longer.
        gate_init: how gates start: `key` (rows of W_k, the paper), `spread` (horizons of 8 to 2000 tokens), `zero`.
        slot_query_scale: learn a per-channel scale of the queries that read the slots.
        slot_bias: learn a per-head bias of the slots' scores.
        mask_empty: hide the slots until something was absorbed.
    """

    slots: Count = 64
    window: Window = 64
    full_attention_layers: FullLayers = []
    sinks: CountFromZero = 4
    tau: Positive = 8.0
    gate_init: Literal["spread", "key", "zero"] = "spread"
    slot_query_scale: StrictBool = True
    slot_bias: StrictBool = True
    mask_empty: StrictBool = True

    def windows(self, num_layers: int) -> list[int | None]:
        """The window of each layer; None keeps the base model's full attention.

        Raises:
            InputError: a list of another length, or a layer that the model does not have.
        """
        if isinstance(self.window, list) and len(self.window) != num_layers:
            raise InputError(
                f"nha.window: the model has {num_layers} layers and needs one entry for each, found {len(self.window)}"
            )
        given = self.window if isinstance(self.window, list) else [self.window] * num_layers
        if isinstance(self.full_attention_layers, str):
            step = int(self.full_attention_layers.split(":")[1])
            full = set(range(step - 1, num_layers, step))
        else:
            full = set(self.full_attention_layers)
        beyond = sorted(layer for layer in full if layer >= num_layers)
        if beyond:
            raise InputError(
                f"nha.full_attention_layers: layers 0 to {num_layers - 1} exist in this model, found {beyond}"
            )
        return [None if layer in full or window == "full" else int(window) for layer, window in enumerate(given)]


class SourceSettings(Settings):
    """One source of training text; `weight` is its share of the windows relative to the other sources."""

    source: Literal["stdlib", "recall", "text", "dataset"]
    weight: Positive = 1.0
    path: str | None = None
    split: str = "train"
    column: str = "text"

    @model_validator(mode="after")
    def _path_where_needed(self) -> SourceSettings:
        if self.source in ("text", "dataset") and not self.path:
            what = "a file, glob or folder of .txt" if self.source == "text" else "a Hub id or a .jsonl/.parquet file"
            raise ValueError(f"`source: {self.source}` needs `path`: {what}")
        if self.source in ("stdlib", "recall") and self.path:
            raise ValueError(f"`source: {self.source}` takes no `path`, found {self.path!r}; use `source: text`")
        return self


class DataSettings(Settings):
    """Where training and held-out text come from."""

    sources: Annotated[list[SourceSettings], Field(min_length=1)]
    held_out_tokens: Tokens = 32768

    @field_validator("sources")
    @classmethod
    def _some_text(cls, sources: list[SourceSettings]) -> list[SourceSettings]:
        if all(source.source == "recall" for source in sources):
            raise ValueError("`recall` documents are filled with text; add one of `stdlib`, `text` or `dataset`")
        return sources


class LoraSettings(Settings):
    """Low-rank adapters on the attention projections."""

    rank: Count = 8
    alpha: Positive = 16
    dropout: Share = 0.0
    targets: Annotated[list[Literal["q_proj", "k_proj", "v_proj", "o_proj"]], Field(min_length=1)] = [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    ]


class StageSettings(Settings):
    """What every training stage has."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")] | None = None
    tokens: Tokens
    sequence_length: Annotated[Count, Field(ge=8)] = 512
    batch_size: Count = 8
    warmup: Share = 0.05
    save_steps: Count = 25

    @property
    def steps(self) -> int:
        """Optimizer steps: tokens / (sequence_length * batch_size), rounded up."""
        return math.ceil(self.tokens / (self.sequence_length * self.batch_size))


class AlignStage(StageSettings):
    """Attention-output alignment: only gates and the slots' query scale and bias learn."""

    kind: Literal["align"]
    learning_rate: Positive = 2.0e-2


class DistillStage(StageSettings):
    """Logit distillation: gates and LoRA learn from the teacher's distribution and the text."""

    kind: Literal["distill"]
    learning_rate: Positive = 1.0e-3
    gate_learning_rate: Positive = 2.0e-3
    kl_weight: Weight = 1.0
    ce_weight: Weight = 0.2
    temperature: Positive = 1.0
    lora: LoraSettings = LoraSettings()

    @model_validator(mode="after")
    def _some_loss(self) -> DistillStage:
        if self.kl_weight == 0 and self.ce_weight == 0:
            raise ValueError("kl_weight and ce_weight are both 0: nothing would be learned; raise one of them")
        return self


Stage = Annotated[AlignStage | DistillStage, Field(discriminator="kind")]


class EvaluateSettings(Settings):
    """What is measured; `recall_distances` are multiples of the window."""

    sequence_length: Annotated[Count, Field(ge=8)] = 1024
    tokens: Tokens = 32768
    recall_pairs: Count = 16
    recall_prompts: Count = 32
    recall_distances: Annotated[list[Count], Field(min_length=1)] = [2, 4, 8, 16]
    recall_value_length: Count = 1


class ExportSettings(Settings):
    """How the result is written."""

    max_shard_size: Annotated[str, BeforeValidator(_size)] = "5GB"


class RuntimeSettings(Settings):
    """Where and how it runs; nothing here changes what is learned except rounding."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Annotated[str, BeforeValidator(_device)] = "auto"
    threads: Count | None = None
    logging_steps: Count = 5


class Recipe(Settings):
    """One conversion, from model to exported checkpoint."""

    model: Annotated[str, Field(min_length=1)]
    output: Annotated[str, Field(min_length=1)]
    seed: CountFromZero = 0
    nha: NHASettings = NHASettings()
    data: DataSettings
    stages: list[Stage]
    evaluate: EvaluateSettings = EvaluateSettings()
    export: ExportSettings = ExportSettings()
    runtime: RuntimeSettings = RuntimeSettings()

    @field_validator("stages")
    @classmethod
    def _distill_is_last(cls, stages: list[AlignStage | DistillStage]) -> list[AlignStage | DistillStage]:
        if any(stage.kind == "distill" for stage in stages[:-1]):
            raise ValueError(
                "a `distill` stage merges its adapters into the teacher's weights; let it be the last stage"
            )
        return stages
