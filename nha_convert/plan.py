"""What a recipe will do and cost, from config.json alone: no weights are loaded. Imports no torch.

Legend: L layers, H query heads, G key/value heads, D head_dim, M slots, W window, S sinks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import InputError
from .families import FAMILIES
from .model_files import check_family, check_windows, read_config
from .recipe import NHASettings, Recipe
from .weights.config_check import size_problems
from .weights.weight_files import refuse

if TYPE_CHECKING:
    from rich.console import Group

BYTES = {"float32": 4, "bfloat16": 2}
CONTEXTS = (1024, 4096, 16384, 65536, 131072)

@dataclass(frozen=True)
class Dimensions:
    """The sizes of a model that a plan needs."""

    family: str
    layers: int
    hidden: int
    heads: int
    groups: int
    head_dim: int
    intermediate: int
    vocabulary: int
    context: int
    tied: bool
    attention_bias: tuple[bool, bool]  # of q, k, v; of o
    mlp_bias: bool
    qk_norm: bool
    experts: int  # feed-forward experts of a mixture-of-experts layer; 0 where every layer is dense
    experts_per_token: int
    expert_size: int
    dense_layers: int  # layers without experts

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """(in, out) of each attention projection."""
        queries, keys = self.heads * self.head_dim, self.groups * self.head_dim
        return {
            "q_proj": (self.hidden, queries),
            "k_proj": (self.hidden, keys),
            "v_proj": (self.hidden, keys),
            "o_proj": (queries, self.hidden),
        }

    @property
    def attention_parameters(self) -> int:
        """Parameters of one layer's attention and its two norms."""
        attention = sum(rows * columns for rows, columns in self.projections.values())
        if self.attention_bias[0]:
            attention += (self.heads + 2 * self.groups) * self.head_dim
        attention += self.hidden * self.attention_bias[1] + 2 * self.head_dim * self.qk_norm
        return attention + 2 * self.hidden

    @property
    def parameters(self) -> int:
        """Parameters of the whole model, all experts included, tied ones once."""
        return self._with_experts(self.experts)

    @property
    def active_parameters(self) -> int:
        """Parameters that one token meets: of the experts, those it is routed to."""
        return self._with_experts(self.experts_per_token)

    def _with_experts(self, experts: int) -> int:
        dense = 3 * self.hidden * self.intermediate + (2 * self.intermediate + self.hidden) * self.mlp_bias
        sparse = experts * 3 * self.hidden * self.expert_size + self.experts * self.hidden  # and the router
        layers = self.layers * self.attention_parameters + self.dense_layers * dense
        layers += (self.layers - self.dense_layers) * sparse
        return layers + self.hidden + self.vocabulary * self.hidden * (2 - self.tied)

    def gate_parameters(self, nha: NHASettings) -> int:
        """New parameters of one NHA layer."""
        gate = (self.hidden + 1) * self.groups * nha.slots
        return gate + self.heads * self.head_dim * nha.slot_query_scale + self.heads * nha.slot_bias

    def full_cache_bytes(self, tokens: int, element: int) -> int:
        """Key/value cache of one full-attention layer for one sequence."""
        return 2 * self.groups * self.head_dim * tokens * element

    def nha_cache_bytes(self, nha: NHASettings, window: int, element: int) -> int:
        """State of one NHA layer for one sequence, at any context: slots, ring, sinks and one count (`NHAState`)."""
        slots = 2 * self.groups * nha.slots * self.head_dim * 4
        token = 2 * self.groups * self.head_dim * element + 2 * self.head_dim * 4
        ring = (window + 1) * (token + self.groups * nha.slots * 4)
        return slots + ring + nha.sinks * token + 8


def model_dimensions(model: str) -> Dimensions:
    """The sizes of a model, from its config.json.

    Raises:
        InputError: not found, of an unsupported family, or a size is missing.
    """
    return dimensions_of(model, read_config(model))


def dimensions_of(model: str, config: dict[str, Any]) -> Dimensions:
    """`model_dimensions` of a config that was read already."""
    family = FAMILIES[check_family(model, config)]
    needed = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
    missing = [key for key in needed if not isinstance(config.get(key), int)]
    if missing:
        raise InputError(f"{model}: config.json has no number for {', '.join(missing)}; save the model anew")
    refuse(size_problems(f"{model}: config.json", config))
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    bias = bool(config.get("attention_bias", False))
    experts, sparse = _experts(config, layers)
    return Dimensions(
        family=family.model_type,
        layers=layers,
        hidden=config["hidden_size"],
        heads=heads,
        groups=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        intermediate=config["intermediate_size"],
        vocabulary=config["vocab_size"],
        context=config.get("max_position_embeddings") or 2048,
        tied=bool(config.get("tie_word_embeddings", False)),
        attention_bias=(True, False) if family.qkv_bias else (bias, bias),
        mlp_bias=bool(config.get("mlp_bias", False)) and family.mlp_bias,
        qk_norm=family.qk_norm,
        experts=experts,
        experts_per_token=min(experts, config.get("num_experts_per_tok") or 0),
        expert_size=config.get("moe_intermediate_size") or 0,
        dense_layers=layers - sparse,
    )


def _experts(config: dict[str, Any], layers: int) -> tuple[int, int]:
    """Experts of a sparse layer, and how many layers are sparse; (0, 0) for dense models."""
    experts = config.get("num_experts") or config.get("num_local_experts") or 0
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    sparse = [layer for layer in range(layers) if experts and layer not in dense and (layer + 1) % step == 0]
    return (experts, len(sparse)) if sparse else (0, 0)


def make_plan(recipe: Recipe, cost: Callable[[Recipe, int], dict[str, int]]) -> dict[str, Any]:
    """What a run of the recipe will change, train, keep and need.

    Args:
        cost: what a stage trains and takes, `plan_memory.stage_cost`.
    Returns:
        {"model", "output", "layers": [row], "parameters", "stages": [row], "cache": [row per context],
        "notes": [text]}; bytes for one sequence, plain ints.
    Raises:
        InputError: the model cannot be found or does not fit the settings.
    """
    sizes = model_dimensions(recipe.model)
    nha, element = recipe.nha, BYTES[recipe.runtime.dtype]
    windows = recipe.nha.windows(sizes.layers)
    check_windows(recipe.model, read_config(recipe.model), windows)
    gate = sizes.gate_parameters(nha)
    new = gate * sum(window is not None for window in windows)
    return {
        "model": recipe.model,
        "family": sizes.family,
        "output": recipe.output,
        "dtype": recipe.runtime.dtype,
        "layers": [
            {
                "layer": layer,
                "attention": "full" if window is None else "nha",
                "window": window,
                "slots": None if window is None else nha.slots,
                "sinks": None if window is None else nha.sinks,
                "new_parameters": 0 if window is None else gate,
            }
            for layer, window in enumerate(windows)
        ],
        "parameters": {"model": sizes.parameters, "new": new},
        "stages": [_stage(recipe, index, sizes, cost(recipe, index)) for index in range(len(recipe.stages))],
        "cache": [_cache(sizes, nha, windows, element, tokens) for tokens in _contexts(sizes.context)],
        "notes": _notes(recipe, windows, new),
    }


def _contexts(trained: int) -> list[int]:
    """Context lengths of the cache table: the usual ones up to the trained one, and that one."""
    return sorted({tokens for tokens in CONTEXTS if tokens < trained} | {trained})


def _cache(sizes: Dimensions, nha: NHASettings, windows: list[int | None], element: int, tokens: int) -> dict[str, int]:
    teacher = sizes.layers * sizes.full_cache_bytes(tokens, element)
    student = sum(
        sizes.full_cache_bytes(tokens, element) if window is None else sizes.nha_cache_bytes(nha, window, element)
        for window in windows
    )
    return {"context": tokens, "teacher_bytes": teacher, "student_bytes": student}


def _stage(recipe: Recipe, index: int, sizes: Dimensions, cost: dict[str, int]) -> dict[str, Any]:
    """One row of the plan: what a stage trains, how long, and the parts of its peak memory.

    FLOPs: 2 per active parameter and token for a forward pass (the teacher's, and but for align the student's), 2 for
    the gradient of activations, and 2 per trained parameter of the base model for its own gradient.
    """
    stage = recipe.stages[index]
    rows = stage.batch_size * stage.sequence_length
    passes = int(stage.compares) + 2 * (stage.kind != "align")
    flops = 2 * passes * sizes.active_parameters + 2 * cost["trained_base_parameters"]
    memory = {name: value for name, value in cost.items() if not name.startswith("trained")}
    return {
        "stage": stage.name or stage.kind,
        "kind": stage.kind,
        "train": list(stage.train),
        "tokens": stage.tokens,
        "steps": stage.steps,
        "sequence_length": stage.sequence_length,
        "batch_size": stage.batch_size,
        "trained_parameters": cost["trained_parameters"],
        "frozen_parameters": sizes.parameters - cost["trained_base_parameters"],
        "training_flops": flops * stage.steps * rows,
        "memory_bytes": memory,
        "peak_bytes": sum(memory.values()),
    }


def _notes(recipe: Recipe, windows: list[int | None], new: int) -> list[str]:
    """What a reader of the plan would want to be told."""
    notes = []
    exact = [window for window in windows if window is not None]
    if not exact:
        notes.append("Every layer keeps full attention: the result computes what the model computes.")
    elif 2 * len(exact) < len(windows):
        notes.append(
            f"{len(windows) - len(exact)} of {len(windows)} layers keep full attention, so most of the cache still "
            "grows; convert more of them"
        )
    for index, stage in enumerate(recipe.stages):
        if exact and min(exact) + recipe.nha.sinks >= stage.sequence_length:
            notes.append(
                f"stages.{index}: its sequences of {stage.sequence_length} tokens fit into every window and the sinks, "
                "so the slots see nothing and learn nothing; raise sequence_length or lower nha.window"
            )
        if stage.tokens < new:
            notes.append(
                f"stages.{index}: {count(stage.tokens)} tokens are fewer than the {count(new)} new parameters; "
                "give it more"
            )
    changing = [stage for stage in recipe.stages if stage.changes_base]
    parts = sorted({part for stage in changing for part in stage.train if part != "gates"})
    if not recipe.stages:
        notes.append("No stages: the model is swapped, measured and exported untrained.")
    elif not changing:
        notes.append("Only gates are trained; every base tensor of the result is the model's own, byte for byte.")
    elif parts == ["lora"]:
        notes.append("Adapters are merged into q/k/v/o; everything else of the model stays frozen.")
    else:
        notes.append(f"The model's own tensors are trained ({', '.join(parts)}), not only its gates.")
    return notes


def render_plan(plan: dict[str, Any]) -> Group:
    """The plan as rich tables: layers, parameters, stages, cache."""
    from rich.console import Group
    from rich.text import Text

    counts = plan["parameters"]
    share = 100 * counts["new"] / counts["model"]
    head = Text(f"{plan['model']} ({plan['family']}, {plan['dtype']}) -> {plan['output']}", style="bold")
    facts = Text(
        f"{count(counts['model'])} parameters of the model, {count(counts['new'])} new ones ({share:.2f} %); "
        "the model's own are frozen"
    )
    notes = [Text(f"note: {note}") for note in plan["notes"]]
    return Group(head, facts, _layer_table(plan), *_stage_table(plan), _cache_table(plan), *notes)


def _layer_table(plan: dict[str, Any]) -> Any:
    """Runs of equal layers in one row each."""
    from rich.table import Table

    table = Table(title="Layers", title_justify="left")
    for column in ("layers", "attention", "window", "slots", "sinks", "new parameters each"):
        table.add_column(column, justify="left" if column in ("layers", "attention") else "right")
    runs: list[list[dict[str, Any]]] = []
    for row in plan["layers"]:
        same = runs and all(runs[-1][0][key] == row[key] for key in row if key != "layer")
        runs[-1].append(row) if same else runs.append([row])
    for run in runs:
        first, last = run[0], run[-1]
        label = str(first["layer"]) if first is last else f"{first['layer']}-{last['layer']}"
        cells = ["-" if first[key] is None else str(first[key]) for key in ("window", "slots", "sinks")]
        table.add_row(label, first["attention"], *cells, count(first["new_parameters"]))
    return table


def _stage_table(plan: dict[str, Any]) -> list[Any]:
    from rich.table import Table

    if not plan["stages"]:
        return []
    table = Table(title="Stages (memory of one process that holds all of it)", title_justify="left")
    table.add_column("stage")
    for column in ("tokens", "steps", "batch x length", "trained", "frozen", "PFLOP", "peak memory"):
        table.add_column(column, justify="right")
    for row in plan["stages"]:
        table.add_row(
            row["stage"],
            count(row["tokens"]),
            str(row["steps"]),
            f"{row['batch_size']} x {row['sequence_length']}",
            count(row["trained_parameters"]),
            count(row["frozen_parameters"]),
            f"{row['training_flops'] / 1e15:.3g}",
            size(row["peak_bytes"]),
        )
    return [table]


def _cache_table(plan: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title="Cache of one sequence", title_justify="left")
    for column in ("context", "model", "NHA", "share"):
        table.add_column(column, justify="right")
    for row in plan["cache"]:
        teacher, student = row["teacher_bytes"], row["student_bytes"]
        table.add_row(str(row["context"]), size(teacher), size(student), f"{100 * student / teacher:.1f} %")
    return table


def count(number: int) -> str:
    """A count in three digits: 6.29M."""
    for unit, factor in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= factor:
            return f"{number / factor:.3g}{unit}"
    return str(number)


def size(number: int) -> str:
    """Bytes in three digits: 1.5 MiB."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number} B"
