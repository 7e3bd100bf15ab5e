"""What a recipe will do and cost, from config.json alone: no weights are loaded. Imports no torch.

Legend: L layers, H query heads, G key/value heads, D head_dim, M slots, W window, S sinks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .errors import InputError
from .families import FAMILIES
from .gpus import SHARE, Machine
from .model_files import check_family, check_windows, read_config
from .plan_fit import fit
from .plan_start import gates_start
from .quantities import BYTES, count, size
from .recipe import NHASettings, Recipe
from .weights.config_check import size_problems
from .weights.weight_files import refuse

CONTEXTS = (1024, 4096, 16384, 65536, 131072)
Cost = Callable[[Recipe, int], dict[str, int]]
Time = Callable[[Recipe, int, Machine], dict[str, Any]]


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

    def gate_parameters(self, nha: NHASettings, slots: int) -> int:
        """New parameters of one NHA layer."""
        gate = (self.hidden + 1) * self.groups * (slots + (nha.gate == "routed"))
        return gate + self.heads * self.head_dim * nha.slot_query_scale + self.heads * nha.slot_bias

    def full_cache_bytes(self, tokens: int, element: int) -> int:
        """Key/value cache of one full-attention layer for one sequence."""
        return 2 * self.groups * self.head_dim * tokens * element

    def nha_cache_bytes(self, nha: NHASettings, slots: int, window: int, element: int) -> int:
        """State of one NHA layer for one sequence, at any context: slots, ring, sinks and one count (`NHAState`)."""
        memory = 2 * self.groups * slots * self.head_dim * 4
        rotary = 0 if nha.slot_rotary else 2 * self.head_dim * 4  # cos and sin; rotated slots take rotated keys
        token = 2 * self.groups * self.head_dim * element + rotary
        ring = (window + 1) * (token + self.groups * slots * 4)
        return memory + ring + nha.sinks * token + 8


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
    sparse = sparse_layers(config, layers)
    experts = (config.get("num_experts") or config.get("num_local_experts") or 0) if sparse else 0
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
        dense_layers=layers - len(sparse),
    )


def sparse_layers(config: dict[str, Any], layers: int) -> set[int]:
    """The layers that are a mixture of experts, of a config.json."""
    experts = config.get("num_experts") or config.get("num_local_experts") or 0
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    return {layer for layer in range(layers) if experts and layer not in dense and (layer + 1) % step == 0}


def stage_windows(recipe: Recipe, index: int, layers: int) -> list[list[int | None]]:
    """The windows that each layer runs with in a stage: one, or those that it is drawn from at every step.

    Args:
        recipe, index: the stage.
        layers: of the model.
    Returns:
        By layer; [None] runs the base model's own attention.
    Raises:
        InputError: the stage's windows do not fit the model.
    """
    stage, kept = recipe.stages[index], recipe.nha.windows(layers)
    if stage.random_windows is not None:
        drawn: list[int | None] = [*dict.fromkeys(stage.random_windows)]
        return [[None] if window is None else drawn for window in kept]
    if stage.windows is None:
        return [[window] for window in kept]
    given = stage.windows if isinstance(stage.windows, list) else None
    where = f"stages.{index}.windows"
    if given is None:
        one = None if stage.windows == "full" else int(str(stage.windows))
        return [[None if window is None else one] for window in kept]
    if len(given) != layers:
        raise InputError(f"{where}: the model has {layers} layers and needs one entry for each, found {len(given)}")
    for layer, (window, before) in enumerate(zip(given, kept)):
        if before is None and window != "full":
            raise InputError(
                f"{where}: layer {layer} keeps full attention (nha) and has no gates, so its window cannot be "
                f"{window}; set it to full there, or convert the layer"
            )
    return [[None if window == "full" else int(window)] for window in given]


def make_plan(recipe: Recipe, cost: Cost, time: Time | None = None, machine: Machine | None = None) -> dict[str, Any]:
    """What a run of the recipe will change, train, keep and need.

    Args:
        cost: what a stage trains and takes, `plan_memory.stage_cost`.
        time: how long it takes, `plan_time.stage_time`.
        machine: what it runs on; given with `time` or not at all.
    Returns:
        {"model", "output", "layers": [row], "parameters", "gates_start" (`plan_start.gates_start`), "stages": [row],
        "cache": [row per context], "notes": [text]}; bytes for one sequence, plain ints. With `machine` also
        {"gpu", "hours"}, and in each stage `training_flops`, `hours` and `hours_of` its parts, and `fits`, whether its
        memory fits one GPU.
    Raises:
        InputError: the model cannot be found or does not fit the settings, or a stage not the GPUs.
    """
    config = read_config(recipe.model)
    sizes = dimensions_of(recipe.model, config)
    chosen, recipe = recipe.nha, recipe.model_copy(update={"nha": recipe.nha.planned(sizes.layers)})
    nha, element = recipe.nha, BYTES[recipe.runtime.dtype]
    windows = nha.windows(sizes.layers)
    check_windows(recipe.model, config, chosen.convertible(sizes.layers))
    slots = nha.slots_by_layer(sizes.layers)
    gates = [0 if window is None else sizes.gate_parameters(nha, own) for window, own in zip(windows, slots)]
    new = sum(gates)
    stages = range(len(recipe.stages))
    runs = [stage_windows(recipe, index, sizes.layers) for index in stages]
    times = [time(recipe, index, machine) if time and machine else {} for index in stages]
    plan = {
        "model": recipe.model,
        "family": sizes.family,
        "output": recipe.output,
        "dtype": recipe.runtime.dtype,
        "layers": [
            {
                "layer": layer,
                "attention": "full" if window is None else "nha",
                "window": window,
                "slots": None if window is None else slots[layer],
                "sinks": None if window is None else nha.sinks,
                "new_parameters": gates[layer],
            }
            for layer, window in enumerate(windows)
        ],
        "parameters": {"model": sizes.parameters, "new": new},
        "gates_start": gates_start(recipe, sizes),
        "stages": [_stage(recipe, index, sizes, cost(recipe, index)) | times[index] for index in stages],
        "cache": [_cache(sizes, nha, windows, element, tokens) for tokens in _contexts(sizes.context)],
        "notes": _to_be_chosen(chosen) + _notes(recipe, windows, runs, gates),
    }
    return plan if machine is None else plan | _on(machine, recipe, plan, cost)


def _to_be_chosen(nha: NHASettings) -> list[str]:
    """What a plan cannot know."""
    note = (
        f"nha.full_attention_layers is {nha.full_attention_layers}: which layers stay full is measured when the run "
        "begins; counted here are as many, evenly spaced"
    )
    return [note] if nha.auto else []


def _on(machine: Machine, recipe: Recipe, plan: dict[str, Any], cost: Cost) -> dict[str, Any]:
    """What a plan says of a machine: `gpu`, `hours`, `stages` with `fits`, and `notes` of what does not fit."""
    gpu = machine.gpu
    rows, notes = [], []
    for index, row in enumerate(plan["stages"]):
        found = fit(recipe, index, row, cost, machine)
        rows.append(row | {"fits": found.fits})
        if not found.fits:
            notes.append(
                f"stages.{index}: its peak of {size(found.needed)} does not fit the {size(gpu.memory)} of one "
                f"{gpu.name}; "
                + (f"set {found.settings}" if found.settings else "no setting makes it fit, so take a larger GPU")
            )
    if rows and not notes:
        notes.append(f"The peak memory of every stage fits one {gpu.name} ({size(gpu.memory)}).")
    return {
        "gpu": {
            "name": gpu.name,
            "count": machine.count,
            "bf16_flops": gpu.half,
            "fp32_flops": gpu.single,
            "bandwidth": gpu.bandwidth,
            "memory_bytes": gpu.memory,
            "share": SHARE,
        },
        "hours": sum(row.get("hours", 0.0) for row in rows),
        "stages": rows,
        "notes": plan["notes"] + notes,
    }


def _contexts(trained: int) -> list[int]:
    """Context lengths of the cache table: the usual ones up to the trained one, and that one."""
    return sorted({tokens for tokens in CONTEXTS if tokens < trained} | {trained})


def _cache(sizes: Dimensions, nha: NHASettings, windows: list[int | None], element: int, tokens: int) -> dict[str, int]:
    teacher = sizes.layers * sizes.full_cache_bytes(tokens, element)
    student = sum(
        sizes.full_cache_bytes(tokens, element) if window is None else sizes.nha_cache_bytes(nha, own, window, element)
        for window, own in zip(windows, nha.slots_by_layer(sizes.layers))
    )
    return {"context": tokens, "teacher_bytes": teacher, "student_bytes": student}


def _stage(recipe: Recipe, index: int, sizes: Dimensions, cost: dict[str, int]) -> dict[str, Any]:
    """One row of the plan: what a stage trains, how long, and the parts of its peak memory."""
    stage = recipe.stages[index]
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
        "memory_bytes": memory,
        "peak_bytes": sum(memory.values()),
    }


def _notes(
    recipe: Recipe, windows: list[int | None], runs: list[list[list[int | None]]], gates: list[int]
) -> list[str]:
    """What a reader of the plan would want to be told.

    Args:
        windows: of each layer; None stays full.
        runs: `stage_windows` of each stage.
        gates: new parameters of each layer.
    """
    notes = []
    nha = sum(window is not None for window in windows)
    if not nha:
        notes.append("Every layer keeps full attention: the result computes what the model computes.")
    elif 2 * nha < len(windows):
        notes.append(
            f"{len(windows) - nha} of {len(windows)} layers keep full attention, so most of the cache still "
            "grows; convert more of them"
        )
    for index in range(len(recipe.stages)):
        if nha:
            notes += [f"stages.{index}: {note}" for note in _stage_notes(recipe, index, runs[index], gates)]
    return [*notes, _kept(recipe)]


def _stage_notes(recipe: Recipe, index: int, runs: list[list[int | None]], gates: list[int]) -> list[str]:
    """Of one stage, whose layers have so many new parameters: what keeps gates from learning."""
    stage, sinks, nha = recipe.stages[index], recipe.nha.sinks, sum(gate > 0 for gate in gates)
    notes = []
    running = [[window for window in choices if window is not None] for choices in runs if choices != [None]]
    if not running:
        notes.append(
            "every layer runs full attention in this stage, so no gate learns in it; set its windows to a number"
        )
    elif len(running) < nha:
        notes.append(
            f"{nha - len(running)} of {nha} NHA layers run full attention in this stage; their gates learn "
            "nothing in it"
        )
    reaching = [[window for window in choices if window + sinks >= stage.sequence_length] for choices in running]
    if running and all(found == choices for found, choices in zip(reaching, running)):
        notes.append(
            f"its sequences of {stage.sequence_length} tokens fit into every window and the sinks, so the slots see "
            f"nothing and learn nothing; raise sequence_length or lower {_windows_key(recipe, index)}"
        )
    elif any(reaching):
        wide = sorted({window for found in reaching for window in found})
        notes.append(
            f"its sequences of {stage.sequence_length} tokens fit into windows of {', '.join(map(str, wide))} and the "
            f"sinks, behind which the slots see nothing; raise sequence_length or lower {_windows_key(recipe, index)}"
        )
    new = sum(gate for gate, choices in zip(gates, runs) if choices != [None])
    if "gates" in stage.train and stage.tokens < new:
        notes.append(
            f"{count(stage.tokens)} tokens are fewer than the {count(new)} new parameters that it trains; give it more"
        )
    return notes


def _windows_key(recipe: Recipe, index: int) -> str:
    """The setting that a stage's windows come from."""
    stage = recipe.stages[index]
    if stage.random_windows is not None:
        return "random_windows"
    return "nha.window" if stage.windows is None else "windows"


def _kept(recipe: Recipe) -> str:
    """What becomes of the model's own tensors."""
    changing = [stage for stage in recipe.stages if stage.changes_base]
    parts = sorted({part for stage in changing for part in stage.train if part != "gates"})
    if not recipe.stages:
        return "No stages: the model is swapped, measured and exported untrained."
    if not changing:
        return "Only gates are trained; every base tensor of the result is the model's own, byte for byte."
    if parts == ["lora"]:
        return "Adapters are merged into q/k/v/o; everything else of the model stays frozen."
    return f"The model's own tensors are trained ({', '.join(parts)}), not only its gates."
