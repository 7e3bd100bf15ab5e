"""Whether a stage's memory fits a GPU, and which settings make it fit. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from .gpus import Machine
from .recipe import Recipe

HELD = ("weights", "gradients", "optimizer")
"""What fsdp2 deals out to its processes."""
MANY = 1024
"""GPUs that are tried at most."""
Cost = Callable[[Recipe, int], dict[str, int]]


@dataclass(frozen=True)
class Fit:
    """The answer.

    Attributes:
        fits: the stage runs on the machine as the recipe has it.
        needed: bytes that one GPU needs for that.
        settings: what makes it fit where it does not: `runtime.micro_batch: 2`; None if nothing does.
    """

    fits: bool
    needed: int
    settings: str | None = None


def fit(recipe: Recipe, index: int, row: dict[str, Any], cost: Cost, machine: Machine) -> Fit:
    """Whether a stage fits each GPU of a machine; if not, the cheapest change with which it does.

    Tried in this order: fewer rows at once, which costs next to nothing; gradient checkpointing, which costs a forward
    pass; both; sharing weights between GPUs with fsdp2.

    Args:
        recipe, index: the stage.
        row: its row of the plan, whose `memory_bytes` are those of a process that takes all rows of a step.
        cost: `plan_memory.stage_cost`, asked for the other settings.
    """
    limit, runtime, batch = machine.gpu.memory, recipe.runtime, recipe.stages[index].batch_size
    shards = machine.count if runtime.engine == "fsdp2" else 1
    now = per_process(row["memory_bytes"], shards)
    if now <= limit:
        return Fit(True, now)
    rows = -(-batch // machine.count)
    rows = min(rows, runtime.micro_batch or rows)
    known = {(min(batch, runtime.micro_batch or batch), runtime.gradient_checkpointing): row["memory_bytes"]}

    def needed(rows: int, checkpointing: bool, shards: int = shards) -> int:
        if (rows, checkpointing) not in known:
            changed = runtime.model_copy(update={"micro_batch": rows, "gradient_checkpointing": checkpointing})
            found = cost(recipe.model_copy(update={"runtime": changed}), index)
            known[rows, checkpointing] = {key: value for key, value in found.items() if not key.startswith("trained")}
        return per_process(known[rows, checkpointing], shards)

    now = needed(rows, runtime.gradient_checkpointing)
    if now <= limit:
        return Fit(True, now)
    for checkpointing in dict.fromkeys((runtime.gradient_checkpointing, True)):
        extra = [] if checkpointing == runtime.gradient_checkpointing else ["runtime.gradient_checkpointing: true"]
        fitting = _rows(rows, partial(needed, checkpointing=checkpointing), limit)
        if fitting == rows:
            return Fit(False, now, " and ".join(extra))
        if fitting and batch >= machine.count * -(-batch // (machine.count * fitting)):  # as `plan_batches` deals
            return Fit(False, now, " and ".join([f"runtime.micro_batch: {fitting}", *extra]))
    return Fit(False, now, _sharded(recipe, index, partial(needed, 1, True), limit))


def per_process(memory: dict[str, int], shards: int) -> int:
    """Bytes of one of the processes among which weights, gradients and optimizer are dealt out; 1 holds all.

    The one layer that fsdp2 gathers at a time is not counted.
    """
    total, held = sum(memory.values()), sum(memory.get(name, 0) for name in HELD)
    live = total - memory.get("allocator", 0)
    return round(total * (live - held + held / shards) / live) if live else 0


def _rows(most: int, needed: Callable[[int], int], limit: int) -> int:
    """The most rows that fit, found by measuring; 0 if none do. Memory is close to linear in rows."""
    least, top = needed(1), needed(most)
    if least > limit:
        return 0
    if top <= limit:
        return most
    rows = 1 + int((most - 1) * (limit - least) / (top - least))
    while rows > 1 and needed(rows) > limit:
        rows //= 2
    return rows


def _sharded(recipe: Recipe, index: int, needed: Callable[[int], int], limit: int) -> str | None:
    """The settings with which the stage fits GPUs that share the weights, at one row each; None if there are none."""
    stage = recipe.stages[index]
    if stage.kind == "align" and stage.changes_base:
        return None  # which fsdp2 does not run
    count = 2
    while needed(count) > limit:
        count *= 2
        if count > MANY:
            return None
    more = f", stages.{index}.batch_size: {count}" if count > stage.batch_size else ""
    return (
        f"runtime.engine: fsdp2 on {count} GPUs or more, runtime.micro_batch: 1, runtime.gradient_checkpointing: true"
        + more
    )
