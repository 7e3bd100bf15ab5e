"""Every setting of a recipe, its type and its limits: one pydantic model, typos refused. Imports no torch.

`nha_convert.recipe` loads, overrides and saves recipes and re-exports these classes.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StrictBool, field_validator, model_validator

from .data_settings import DataSettings
from .errors import InputError
from .settings_types import (
    AUTO,
    DEFAULT_METHOD,
    NEEDS_TEXT,
    PAPER_LAYER,
    START_ROWS,
    Count,
    CountFromZero,
    FullLayers,
    Positive,
    Settings,
    Slots,
    Tokens,
    Window,
    device_name,
    size_text,
)
from .stage_settings import BASE_PARTS, Stage

RecallTaskName = Literal[
    "recall", "mqar", "needle", "needle_multikey", "needle_multivalue", "variable_tracking", "copy"
]


class NHASettings(Settings):
    """What each attention layer becomes.

    Attributes:
        layer: `own`, or `paper`: what is not given of sinks, gate, tau, gate_init, slot_query_scale, slot_bias,
            slot_rotary and mask_empty is then as in the paper. `--set nha.layer=paper` drops what a recipe gives of
            them; a further `--set` changes them again.
        slots: memory slots per key/value head; a number, or one per layer.
        window: exact tokens each query sees, itself included; an int, `full`, or one of these per layer.
        full_attention_layers: layers (from 0) that stay the base model's own attention; `every:N` keeps
            layers N-1, 2N-1, ...; `auto:N` those N that need it most by measurement when the run begins,
            `auto:N:METHOD` by another measure (`attention`, `alignment`, `kl`, `restore`, `recall`).
        sinks: first tokens that stay exact for ever.
        gate: `independent` (every slot has a decay of its own, as in the paper), or `routed` (a token is written once,
            with a strength of its own that a softmax shares out among the slots); `routed` starts `attended`.
        tau: divides the log-sigmoid of independent gates; larger remembers longer. Routed gates do not read it.
        gate_init: how gates start: `key` (rows of W_k, the paper), `spread` (horizons of 8 to 2000 tokens), `horizons`
            (from the window to the length of a training row), `clusters` (as that, each slot written to by one cluster
            of the teacher's keys), `calibrated` (as `clusters`, scaled to the teacher's attention output), `attended`
            (slots write what the teacher attends to from beyond the window, scaled so), `zero`. `clusters`,
            `calibrated` and `attended` run the teacher over some rows of the first stage's text. Not given: `attended`
            in a recipe with stages, `spread` where nothing is trained or layers are trained a few at a time.
        gate_init_rows: how many rows of text such a start reads, of up to 1,024 tokens (fewer of longer ones), all in
            one pass of the teacher.
        gate_horizons: shortest and longest horizon in tokens, for `horizons`, `clusters` and `calibrated`.
        slot_query_scale: learn a per-channel scale of the queries that read the slots.
        slot_bias: learn a per-head bias of the slots' scores.
        slot_rotary: slots take rotated keys and are met by rotated queries, so that they know how far away what they
            hold is.
        mask_empty: hide the slots until something was absorbed.
    """

    layer: Annotated[Literal["own", "paper"], Field(frozen=True)] = "own"
    slots: Slots = 64
    window: Window = 64
    full_attention_layers: FullLayers = []
    sinks: CountFromZero = 4
    gate: Literal["independent", "routed"] = "independent"
    tau: Positive = 8.0
    gate_init: Literal["spread", "key", "zero", "horizons", "clusters", "calibrated", "attended"] = "spread"
    gate_init_rows: Count = START_ROWS
    gate_horizons: Annotated[list[Annotated[float, Field(gt=1)]], Field(min_length=2, max_length=2)] | None = None
    slot_query_scale: StrictBool = True
    slot_bias: StrictBool = True
    slot_rotary: StrictBool = False
    mask_empty: StrictBool = True

    @model_validator(mode="before")
    @classmethod
    def _papers_layer(cls, data: Any) -> Any:
        return PAPER_LAYER | data if isinstance(data, dict) and data.get("layer") == "paper" else data

    @model_validator(mode="after")
    def _routed_reads_text(self) -> NHASettings:
        if self.gate == "routed" and self.gate_init != "attended":
            if "gate_init" in self.model_fields_set:
                of_paper = " of layer: paper" if self.layer == "paper" else ""
                raise ValueError(
                    f"gate is routed, which starts from what the teacher attends to, found gate_init {self.gate_init}"
                    f"{of_paper}; set gate_init to attended, or gate to independent"
                )
            self.__dict__["gate_init"] = "attended"
        return self

    @model_validator(mode="after")
    def _horizons_fit(self) -> NHASettings:
        if self.gate_horizons is None:
            return self
        if self.gate == "routed":
            raise ValueError("gate_horizons is not read by routed gates; remove it, or set gate to independent")
        if self.gate_init not in ("horizons", "clusters", "calibrated"):
            raise ValueError(
                f"gate_horizons is read by gate_init horizons, clusters and calibrated, found {self.gate_init}; remove "
                "one"
            )
        if self.gate_horizons[0] >= self.gate_horizons[1]:
            raise ValueError(
                f"gate_horizons is [shortest, longest] in tokens, found {self.gate_horizons}; the first must be smaller"
            )
        return self

    @property
    def auto(self) -> tuple[int, str] | None:
        """How many layers are to be chosen by measurement, and by which; None where they are named."""
        found = AUTO.fullmatch(self.full_attention_layers) if isinstance(self.full_attention_layers, str) else None
        return (int(found[1]), found[2] or DEFAULT_METHOD) if found else None

    def convertible(self, num_layers: int) -> list[int | None]:
        """`windows`, with all layers that `auto:N` chooses among as NHA layers.

        Raises:
            InputError: as `windows`.
        """
        return (self.model_copy(update={"full_attention_layers": []}) if self.auto else self).windows(num_layers)

    def candidates(self, num_layers: int) -> dict[int, int]:
        """Window of every layer that `auto:N` chooses among: of all whose window is a number.

        Raises:
            InputError: a list of another length, or fewer layers than are to be chosen.
        """
        every = enumerate(self.convertible(num_layers))
        found = {layer: window for layer, window in every if window is not None}
        if self.auto and self.auto[0] > len(found):
            raise InputError(
                f"nha.full_attention_layers: {self.full_attention_layers} keeps {self.auto[0]} layers full, but the "
                f"model has {len(found)} layers with a window; name at most {len(found)}"
            )
        return found

    def planned(self, num_layers: int) -> NHASettings:
        """These settings with as many layers named, evenly spaced, as `auto:N` will choose; for sizes, not for models.

        Raises:
            InputError: as `candidates`.
        """
        if self.auto is None:
            return self
        layers, count = sorted(self.candidates(num_layers)), self.auto[0]
        spaced = [layers[(place + 1) * len(layers) // count - 1] for place in range(count)]
        return self.model_copy(update={"full_attention_layers": spaced})

    def slots_by_layer(self, num_layers: int) -> list[int]:
        """The slots of each layer; those of layers that stay full are not read.

        Raises:
            InputError: a list of another length.
        """
        if not isinstance(self.slots, list):
            return [self.slots] * num_layers
        if len(self.slots) != num_layers:
            raise InputError(
                f"nha.slots: the model has {num_layers} layers and needs one number, or one for each, found "
                f"{len(self.slots)}"
            )
        return self.slots

    def windows(self, num_layers: int) -> list[int | None]:
        """The window of each layer; None keeps the base model's full attention.

        Raises:
            InputError: a list of another length, a layer that the model does not have, or layers still to be chosen.
        """
        if self.auto is not None:
            raise InputError(
                f"nha.full_attention_layers: {self.full_attention_layers} is measured where a conversion begins (run, "
                "swap); name the layers here, such as [3, 7] (`nha-convert search` finds them)"
            )
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


class EvaluateSettings(Settings):
    """What is measured.

    Attributes:
        sequence_length, tokens: windows of held-out text, and how much of it.
        recall_pairs, recall_prompts, recall_value_length: the recall table of every row.
        recall_distances: of its questions, as multiples of the window.
        tasks: what is asked by generation: `recall` is that table; the others (docs/evaluation.md) are asked of the
            teacher and of the final model alone.
        task_pairs: `mqar`: numbers of keys and values.
        task_prompts: questions per cell.
        task_distances: as multiples of the window.
        layer_ablation: of the final model, also mask the slots of one layer at a time.
        seed: of what the recall table and the tasks ask, and of the confidence intervals.
        benchmark: at the end of a run, also time the final model beside its teacher; `nha-convert bench` always does.
        benchmark_contexts: tokens before the timed decode step, in caches that are filled, not read.
        benchmark_prefill: tokens of the timed prefills; [] times none.
        benchmark_repeats: timed decode steps of each per context, by turns.
        benchmark_seconds: after so many at one context repeats stop (6 at least); longer prefills are left out.
    """

    sequence_length: Annotated[Count, Field(ge=8)] = 1024
    tokens: Tokens = 32768
    recall_pairs: Count = 16
    recall_prompts: Count = 32
    recall_distances: Annotated[list[Count], Field(min_length=1)] = [2, 4, 8, 16]
    recall_value_length: Count = 1
    tasks: list[RecallTaskName] = ["recall"]
    task_pairs: Annotated[list[Count], Field(min_length=1)] = [4, 8, 16, 32, 64, 128]
    task_prompts: Count = 32
    task_distances: Annotated[list[Positive], Field(min_length=1)] = [0.5, 1, 2, 4, 8, 16, 32]
    layer_ablation: StrictBool = False
    seed: CountFromZero = 0
    benchmark: StrictBool = True
    benchmark_contexts: Annotated[list[Tokens], Field(min_length=1)] = [1024, 4096, 16384, 32768]
    benchmark_prefill: list[Tokens] = [1024, 4096]
    benchmark_repeats: Count = 20
    benchmark_seconds: Positive = 10.0

    @field_validator("tasks")
    @classmethod
    def _tasks_once(cls, tasks: list[RecallTaskName]) -> list[RecallTaskName]:
        twice = sorted({task for task in tasks if tasks.count(task) > 1})
        if twice:
            raise ValueError(f"every task is measured once, found twice: {', '.join(twice)}; keep one")
        return tasks


class SearchSettings(Settings):
    """How `auto:N` and `search` measure which layers need full attention.

    Attributes:
        tokens: of training text, measured once per layer and window; recall documents come on top.
        sequence_length: of a row; not given: `evaluate.sequence_length`.
        branch: what an NHA layer has while it is measured: `window` hides the slots, which have learnt nothing before
            a run; `both` is the layer as it is.
    """

    tokens: Tokens = 16384
    sequence_length: Annotated[Count, Field(ge=8)] | None = None
    branch: Literal["window", "both"] = "window"


class ExportSettings(Settings):
    """How the result is written."""

    max_shard_size: Annotated[str, BeforeValidator(size_text)] = "5GB"


class RuntimeSettings(Settings):
    """Where and how it runs; but for `dtype` nothing here changes what is learned except rounding.

    Attributes:
        dtype: of the weights; gates are fp32 always.
        threads: of one process on a CPU.
        logging_steps: optimizer steps between two rows of metrics.jsonl.
        engine: `ddp` (each process holds the whole model) or `fsdp2` (each holds a share); `auto` is one process where
            there is one, else ddp.
        micro_batch: rows of one forward pass of one process; a step's rows are cut into such pieces. Not given: all
            rows that a process has.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
        compile: compile the decoder layers' feed-forward part and norms with `torch.compile`.
        cpu_offload: keep weights, gradients and optimizer state in host memory between uses (fsdp2 on a GPU).
        layers_at_once: alignment with so many layers in memory; the rest of the model stays on disk, for models that do
            not fit. Not given: all of them.
        cached_tokens: with that, tokens whose hidden states lie on disk at once, in the run folder; after so many each
            layer is read again and a checkpoint is written.
        rank_timeout: seconds after which a process that does not answer counts as lost.
        report_to: what also receives the rows of metrics.jsonl.
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Annotated[str, BeforeValidator(device_name)] = "auto"
    threads: Count | None = None
    logging_steps: Count = 5
    engine: Literal["auto", "ddp", "fsdp2"] = "auto"
    micro_batch: Count | None = None
    gradient_checkpointing: StrictBool = False
    compile: StrictBool = False
    cpu_offload: StrictBool = False
    layers_at_once: Count | None = None
    cached_tokens: Tokens = 1_000_000
    rank_timeout: Positive = 600.0
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = "none"


class Recipe(Settings):
    """One conversion, from model to exported checkpoint."""

    model: Annotated[str, Field(min_length=1)]
    output: Annotated[str, Field(min_length=1)]
    seed: CountFromZero = 0
    nha: NHASettings = NHASettings()
    data: DataSettings
    stages: list[Stage]
    evaluate: EvaluateSettings = EvaluateSettings()
    search: SearchSettings = SearchSettings()
    export: ExportSettings = ExportSettings()
    runtime: RuntimeSettings = RuntimeSettings()

    @model_validator(mode="after")
    def _sources_exist(self) -> Recipe:
        for index, stage in enumerate(self.stages):
            try:
                self.data.of_stage(stage.sources)
            except ValueError as error:
                raise ValueError(f"stages.{index}.sources: {error}") from error
        return self

    def needs_teacher(self, index: int) -> bool:
        """Whether stage `index` reads a teacher that the student's own weights are not any more (or will not stay)."""
        stage = self.stages[index]
        own = any(part in BASE_PARTS for part in stage.train)
        return stage.compares and (own or any(before.changes_base for before in self.stages[:index]))

    @property
    def training_length(self) -> int | None:
        """Tokens of a row of the first stage, which gates' horizons reach to; None where nothing is trained."""
        return self.stages[0].sequence_length if self.stages else None

    def by_layer(self, index: int) -> bool:
        """Whether stage `index` is trained with a few layers in memory at a time."""
        return self.runtime.layers_at_once is not None and self.stages[index].kind == "align"

    @model_validator(mode="after")
    def _gates_start(self) -> Recipe:
        if self.stages and not self.by_layer(0) and "gate_init" not in self.nha.model_fields_set:
            self.__dict__["nha"] = self.nha.model_copy(update={"gate_init": "attended"})
        if self.nha.gate_init not in NEEDS_TEXT and self.nha.gate_init_rows != START_ROWS:
            raise ValueError(
                f"nha.gate_init_rows is {self.nha.gate_init_rows}, but nha.gate_init {self.nha.gate_init} reads no "
                f"text; set it to {', '.join(NEEDS_TEXT[:-1])} or {NEEDS_TEXT[-1]}, or remove nha.gate_init_rows"
            )
        return self

    @model_validator(mode="after")
    def _layers_at_once_fit(self) -> Recipe:
        if self.runtime.layers_at_once is None:
            return self
        where = f"runtime.layers_at_once is {self.runtime.layers_at_once}"
        if self.runtime.engine == "fsdp2":
            raise ValueError(f"{where} with runtime.engine fsdp2, which spreads layers over processes; remove one")
        if not any(self.by_layer(index) for index in range(len(self.stages))):
            raise ValueError(f"{where}, but no stage is of kind align, which alone can be trained so; remove it")
        if self.by_layer(0) and self.nha.gate_init in NEEDS_TEXT:
            fix = "set nha.gate_init to horizons, spread, key or zero"
            if self.nha.gate == "routed":
                fix = "set nha.gate to independent and nha.gate_init to horizons, spread, key or zero"
            raise ValueError(
                f"{where}, and nha.gate_init {self.nha.gate_init} needs the whole model in memory; {fix}, or remove "
                "runtime.layers_at_once"
            )
        for index, stage in enumerate(self.stages):
            changed = [before.label for before in self.stages[:index] if before.changes_base]
            if self.by_layer(index) and (stage.changes_base or changed):
                found = f"its train is {stage.train}" if stage.changes_base else f"{changed[0]} trains more"
                raise ValueError(
                    f"{where}: layers are read from the base model, so stages.{index} and those before it can train "
                    f"gates alone; {found}; set train: gates there, or remove runtime.layers_at_once"
                )
        return self

    @model_validator(mode="after")
    def _precisions_fit(self) -> Recipe:
        for index, stage in enumerate(self.stages):
            where = f"stages.{index}"
            if self.runtime.dtype == "bfloat16" and any(part in BASE_PARTS for part in stage.train):
                raise ValueError(
                    f"{where}.train is {stage.train} with runtime.dtype bfloat16, in which small steps of the weights "
                    f"are lost; set runtime.dtype: float32 and {where}.precision: bfloat16, or train lora"
                )
            if self.runtime.dtype == "bfloat16" and stage.precision == "float32":
                raise ValueError(
                    f"{where}.precision is float32 with weights of bfloat16; set runtime.dtype: float32, or remove it"
                )
        return self
