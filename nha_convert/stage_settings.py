"""The settings of training stages: what learns, from what, how fast and for how long. Imports no torch.

`nha_convert.settings` has the rest of a recipe.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from .settings_types import Count, CountFromZero, Positive, Settings, Share, Tokens, Weight, Window


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


TrainedPart = Literal["gates", "lora", "qkvo", "no_mlp", "all"]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
BASE_PARTS = ("qkvo", "no_mlp", "all")
"""Parts of `train` that are tensors of the base model themselves."""


def _parts(value: Any) -> Any:
    """One part of `train` as a list; a list in the order of the choices, each once."""
    order = ("gates", "lora", "qkvo", "no_mlp", "all")
    parts = [value] if isinstance(value, str) else value
    if isinstance(parts, list) and all(part in order for part in parts):
        return [part for part in order if part in parts]
    return parts


class StageSettings(Settings):
    """What every training stage has.

    Attributes:
        sequence_length: tokens of a row.
        batch_size: rows of an optimizer step, over all processes and accumulated batches.
        batch_tokens: the same in tokens, such as `64k`, down to whole rows; given instead of `batch_size`, which it
            sets.
        train: what learns, one or a list: `gates` (all new parameters), `lora` (adapters, merged in the end), `qkvo`
            (attention projections), `no_mlp` (all of the base model but feed-forward layers), `all` (all of the base
            model). Gates learn only where they are named.
        learning_rate: of all that learns; of all but gates where `gate_learning_rate` is given.
        weight_decay: of matrices; gates, biases and norms have none.
        schedule: after the warmup, `cosine` falls to 0, `wsd` stays and falls over its last part, `constant` stays.
        warmup: share of the steps over which rates rise from 0.
        decay: share of the steps over which `wsd` falls; 0.1 if not given.
        precision: of matrix products; the weights have `runtime.dtype`. Not given: as the weights.
        sources: names of the sources of `data` that this stage reads; all if not given.
        windows: windows of the NHA layers in this stage, as `nha.window`; afterwards they are what they were.
        random_windows: windows drawn anew for every NHA layer at every step, so that the model does not rely on one.
    """

    kind: str
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")] | None = None
    tokens: Tokens
    sequence_length: Annotated[Count, Field(ge=8)] = 512
    batch_size: Count = 8
    batch_tokens: Annotated[Tokens | None, Field(exclude=True)] = None
    train: Annotated[list[TrainedPart], BeforeValidator(_parts), Field(min_length=1)] = ["gates"]
    learning_rate: Positive = 1.0e-3
    gate_learning_rate: Positive | None = None
    weight_decay: Weight = 0.0
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup: Share = 0.05
    decay: Share | None = None
    precision: Literal["float32", "bfloat16"] | None = None
    sources: Annotated[list[str], Field(min_length=1)] | None = None
    windows: Window | None = None
    random_windows: Annotated[list[CountFromZero], Field(min_length=1)] | None = None
    lora: LoraSettings = LoraSettings()
    save_steps: Count = 25

    @property
    def steps(self) -> int:
        """Optimizer steps: tokens / (sequence_length * batch_size), rounded up."""
        return math.ceil(self.tokens / (self.sequence_length * self.batch_size))

    @property
    def label(self) -> str:
        """What messages call it."""
        return f"stages, {self.name or self.kind}"

    @property
    def changes_base(self) -> bool:
        """Whether the base model's tensors are others after this stage."""
        return self.train != ["gates"]

    @property
    def compares(self) -> bool:
        """Whether the loss reads the teacher."""
        return True

    def may_change(self, name: str) -> bool:
        """Whether this stage trains, itself or by an adapter, the base tensor of a name such as
        `model.layers.0.self_attn.q_proj.weight`.
        """
        module = name.split(".")[-2]
        if "lora" in self.train and module in self.lora.targets:
            return name.endswith(".weight")
        if "qkvo" in self.train:
            return module in PROJECTIONS
        return "all" in self.train or ("no_mlp" in self.train and ".mlp." not in name)

    @model_validator(mode="after")
    def _one_batch(self) -> StageSettings:
        if self.batch_tokens is None:
            return self
        if "batch_size" in self.model_fields_set:
            raise ValueError(
                f"batch_size {self.batch_size} and batch_tokens {self.batch_tokens} say the same thing; keep one"
            )
        rows = self.batch_tokens // self.sequence_length
        if not rows:
            raise ValueError(
                f"batch_tokens is {self.batch_tokens}, fewer than one row of sequence_length = "
                f"{self.sequence_length} tokens; raise it or lower sequence_length"
            )
        self.__dict__.update(batch_size=rows, batch_tokens=None)
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> StageSettings:
        base = [part for part in self.train if part in BASE_PARTS]
        if len(base) > 1 or (base and "lora" in self.train):
            raise ValueError(
                f"train is {self.train}: keep one of lora, qkvo, no_mlp, all (and `gates` beside it); the others "
                "would train the same tensors twice"
            )
        if self.decay is not None and self.schedule != "wsd":
            raise ValueError(f"decay is read by `schedule: wsd` alone, found schedule {self.schedule}; remove one")
        if self.random_windows is not None and self.windows is not None:
            raise ValueError("windows and random_windows say the same thing; keep one")
        if self.warmup + (self.decay or 0) > 1:
            raise ValueError(f"warmup {self.warmup:g} and decay {self.decay:g} are more than 1 together; lower one")
        if "lora" not in self.train and self.lora != LoraSettings():
            raise ValueError(f"lora is set, but train is {self.train}; add `lora` to train or remove the setting")
        if "gates" not in self.train and self.gate_learning_rate != self._default("gate_learning_rate"):
            raise ValueError(f"gate_learning_rate is set, but train is {self.train}; add `gates` or remove the setting")
        return self

    @classmethod
    def _default(cls, name: str) -> Any:
        return cls.model_fields[name].default


class AlignStage(StageSettings):
    """Attention-output alignment: each NHA layer alone, on its teacher's inputs.

    Attributes:
        memory_weight: weight of a second term in which the layer has its slots alone, so that these carry what the
            window would.
        far_weight: share of the loss in which a token counts by how much of its teacher's attention lies beyond the
            window, and not by its energy alone.
    """

    kind: Literal["align"]
    learning_rate: Positive = 2.0e-2
    memory_weight: Weight = 0.0
    far_weight: Annotated[Weight, Field(le=1)] = 0.0

    @model_validator(mode="after")
    def _attention_only(self) -> AlignStage:
        wide = [part for part in self.train if part in ("no_mlp", "all")]
        if wide:
            raise ValueError(f"train: alignment compares attention alone, found {wide[0]}; allowed: gates, lora, qkvo")
        return self


class HiddenStage(StageSettings):
    """Hidden-state distillation: after every block the student, on its own inputs, is to be where the teacher is."""

    kind: Literal["hidden"]
    train: Annotated[list[TrainedPart], BeforeValidator(_parts), Field(min_length=1)] = ["gates", "lora"]
    gate_learning_rate: Positive | None = 2.0e-3

    def may_change(self, name: str) -> bool:
        """As in every stage, but for the last norm and the head, which come after all that is compared."""
        return (".layers." in name or "embed_tokens" in name) and super().may_change(name)


class LossSettings(Settings):
    """One term of a loss.

    Attributes:
        function: `kl` (teacher || student) and `reverse_kl` of next-token distributions, `ce` (cross entropy to the
            text), `hidden` (states after every block), `attention` (outputs of every NHA layer).
        temperature: of `kl` and `reverse_kl`.
    """

    function: Literal["kl", "reverse_kl", "ce", "hidden", "attention"]
    weight: Positive = 1.0
    temperature: Positive = 1.0

    @model_validator(mode="after")
    def _temperature_where_read(self) -> LossSettings:
        if self.temperature != 1 and self.function not in ("kl", "reverse_kl"):
            raise ValueError(f"temperature is read by kl and reverse_kl alone, found it at {self.function}; remove it")
        return self


class DistillStage(StageSettings):
    """Distillation of the whole model: a weighted list of losses."""

    kind: Literal["distill"]
    train: Annotated[list[TrainedPart], BeforeValidator(_parts), Field(min_length=1)] = ["gates", "lora"]
    gate_learning_rate: Positive | None = 2.0e-3
    losses: Annotated[list[LossSettings], Field(min_length=1)] = [
        LossSettings(function="kl"),
        LossSettings(function="ce", weight=0.2),
    ]

    @property
    def compares(self) -> bool:
        return any(loss.function != "ce" for loss in self.losses)

    @model_validator(mode="after")
    def _each_once(self) -> DistillStage:
        names = [loss.function for loss in self.losses]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"losses: {', '.join(twice)} stands twice; keep one entry and add the weights")
        return self


class FinetuneStage(StageSettings):
    """Cross entropy to the text alone, also at long context; no teacher runs."""

    kind: Literal["finetune"]
    train: Annotated[list[TrainedPart], BeforeValidator(_parts), Field(min_length=1)] = ["gates", "lora"]
    learning_rate: Positive = 1.0e-4

    @property
    def compares(self) -> bool:
        return False


Stage = Annotated[AlignStage | HiddenStage | DistillStage | FinetuneStage, Field(discriminator="kind")]
