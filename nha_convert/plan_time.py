"""How long the stages of a recipe take on a named GPU, from the sizes of the model and the floors of the kernels.

An estimate: matrix products, sequence mixing and the head are counted, each at `SHARE` of the data sheet's peaks. What
is small beside them (norms, losses, the optimizer, reading data) and what is not training (the evaluation, export) is
not. Biases are left out, every token counts as predicted but the last of a row, and softmax attention as causal.

Legend: T tokens of a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nha_kernels import floors

from .families import FAMILIES
from .gpus import SHARE, Machine
from .model_files import read_config
from .plan import Dimensions, dimensions_of, sparse_layers, stage_windows
from .recipe import Recipe
from .stage_settings import StageSettings
from .train.batches import plan_batches
from .train.losses import CHUNK

PARTS = (
    *("teacher_products", "teacher_attention", "forward_products", "forward_attention"),
    *("backward_products", "backward_attention", "head"),
)
"""Products are those of projections, adapters, gates and feed-forward layers; attention is what mixes tokens."""


@dataclass(frozen=True)
class Item:
    """Work of one token.

    Attributes:
        part: one of `PARTS`.
        work: FLOPs and bytes.
        single: in fp32, whatever the stage's precision is.
    """

    part: str
    work: floors.Work
    single: bool = False


def stage_time(recipe: Recipe, index: int, machine: Machine) -> dict[str, Any]:
    """FLOPs and hours of one stage.

    Args:
        recipe: its model's config.json is read.
        index: of the stage.
        machine: what it trains on; several GPUs share the work as if nothing were lost between them.
    Returns:
        training_flops: FLOPs of all GPUs together. hours: until the stage is over. hours_of: the same by `PARTS`.
    Raises:
        InputError: the stage's rows cannot be dealt out to so many processes, or its windows do not fit the model.
    """
    stage, gpu = recipe.stages[index], machine.gpu
    tokens = stage.steps * stage.batch_size * stage.sequence_length
    single = floors.Peaks(SHARE * gpu.single, SHARE * gpu.bandwidth)
    plain = floors.Peaks(SHARE * gpu.half, SHARE * gpu.bandwidth) if in_half(recipe, stage) else single
    hours = dict.fromkeys(PARTS, 0.0)
    flops = 0.0
    for item in stage_work(recipe, index, machine.count):
        milliseconds = floors.floor(item.work, tokens, single if item.single else plain)["ms"]
        hours[item.part] += milliseconds / 3.6e6 / machine.count
        flops += item.work.flops * tokens
    return {"training_flops": round(flops), "hours": sum(hours.values()), "hours_of": hours}


def in_half(recipe: Recipe, stage: StageSettings) -> bool:
    """Whether a stage's products are of 16 bit."""
    return "bfloat16" in (recipe.runtime.dtype, stage.precision)


def stage_work(recipe: Recipe, index: int, processes: int = 1) -> list[Item]:
    """All that one token of a stage costs, each kind of work and layer on its own.

    Args:
        recipe, index: the stage.
        processes: that share its rows; how many rows one holds decides whether the head runs twice.
    Raises:
        InputError: as `stage_time`.
    """
    counted = _Stage(recipe, index, processes)
    return list(counted.align() if recipe.stages[index].kind == "align" else counted.whole())


class _Stage:
    """What is counted of one stage; `nha_convert.train.objectives` does what is counted here."""

    def __init__(self, recipe: Recipe, index: int, processes: int) -> None:
        config = read_config(recipe.model)
        self.recipe, self.index, self.stage = recipe, index, recipe.stages[index]
        self.sizes: Dimensions = dimensions_of(recipe.model, config)
        self.windows = stage_windows(recipe, index, self.sizes.layers)
        self.reach = FAMILIES[self.sizes.family].sliding_windows(config)
        self.sparse = sparse_layers(config, self.sizes.layers)
        batches = plan_batches(self.stage.batch_size, processes, recipe.runtime.micro_batch, f"stages.{index}")
        self.rows = -(-batches.rows // (batches.ranks * batches.accumulation))  # of a forward pass, at most
        self.element = floors.HALF if in_half(recipe, self.stage) else floors.SINGLE
        elements = {name: rows * columns for name, (rows, columns) in self.sizes.projections.items()}
        self.output = elements.pop("o_proj")
        self.inputs = sum(elements.values())  # q, k, v
        self.slots = recipe.nha.slots_by_layer(self.sizes.layers)
        train = self.stage.train
        self.trains_gates = "gates" in train
        self.trains_attention = any(part in train for part in ("qkvo", "no_mlp", "all"))
        self.trains_all = "all" in train
        self.trains_ends = any(part in train for part in ("no_mlp", "all"))  # embeddings, norms, head
        self.adapted = self.stage.lora.targets if "lora" in train else []

    # ---- stages --------------------------------------------------------------------------------
    def align(self) -> Iterator[Item]:
        """The teacher up to the last NHA layer; of each NHA layer its own attention and the gradient of that."""
        stage, sizes = self.stage, self.sizes
        nha = [layer for layer in range(sizes.layers) if self.runs_nha(layer)]
        if not nha:
            return
        whole = self.recipe.runtime.engine == "fsdp2"  # which lets no pass end early
        for layer in range(sizes.layers if whole else nha[-1] + 1):
            mlp = self.feed_forward(layer) if whole or layer < nha[-1] else 0
            yield self.products("teacher_products", self.inputs + self.output + mlp)
            yield Item("teacher_attention", self.softmax(layer, backward=False))
        shared = not self.recipe.needs_teacher(self.index) and not self.adapted  # q, k and v are the teacher's own
        passes = 1 + bool(getattr(stage, "memory_weight", 0))
        for layer in nha:
            for _ in range(passes):
                yield from self.attention_forward("forward", layer, inputs=not shared)
                yield from self.attention_backward(layer, below=False)

    def whole(self) -> Iterator[Item]:
        """Teacher, student forward and backward, and the head."""
        layers = range(self.sizes.layers)
        if self.stage.compares:
            for layer in layers:
                yield self.products("teacher_products", self.inputs + self.output + self.feed_forward(layer))
                yield Item("teacher_attention", self.softmax(layer, backward=False))
        below = self.trains_ends  # whether a layer's input has a gradient
        for layer in layers:
            yield from self.layer_forward("forward", layer)
            learns = self.learns(layer)
            if below or learns:
                if self.recipe.runtime.gradient_checkpointing:
                    yield from self.layer_forward("backward", layer)
                yield from self.attention_backward(layer, below)
                yield self.products("backward_products", self.feed_forward(layer) * (1 + self.trains_all))
            below = below or learns
        yield from self.head()

    def head(self) -> Iterator[Item]:
        """Logits of student and teacher, as `losses.token_sums` makes them: twice where it needs several pieces."""
        stage = self.stage
        functions = ["ce"] if stage.kind == "finetune" else [loss.function for loss in getattr(stage, "losses", [])]
        if not set(functions) & {"kl", "reverse_kl", "ce"}:
            return
        predicted = (stage.sequence_length - 1) / stage.sequence_length
        pieces = self.rows * (stage.sequence_length - 1) > max(1, CHUNK // self.sizes.vocabulary)
        forward = (1 + stage.compares) * (1 + pieces)
        elements = self.sizes.hidden * self.sizes.vocabulary * (forward + 1 + self.trains_ends)
        yield self.products("head", elements * predicted)

    # ---- layers --------------------------------------------------------------------------------
    def layer_forward(self, which: str, layer: int) -> Iterator[Item]:
        """One layer of the student; `which` is the part that it counts under: backward where it runs again."""
        yield from self.attention_forward(which, layer)
        yield self.products(f"{which}_products", self.feed_forward(layer))

    def attention_forward(self, which: str, layer: int, inputs: bool = True) -> Iterator[Item]:
        """Attention of the student in one layer; `inputs`: with q, k and v."""
        adapters = sum(sum(self.adapter(name)) for name in self.adapted)
        yield self.products(f"{which}_products", self.output + inputs * self.inputs + adapters)
        if self.runs_nha(layer):
            yield self.products(f"{which}_products", self.gate(layer), single=True)
        yield from self.mixing(which, layer, backward=False)

    def attention_backward(self, layer: int, below: bool) -> Iterator[Item]:
        """The gradient of that: of activations where something under them learns, of weights where they do."""
        gates = self.trains_gates and self.runs_nha(layer)
        inside = below or gates or self.trains_attention or any(name != "o_proj" for name in self.adapted)
        elements = below * self.inputs + inside * self.output
        elements += self.trains_attention * (self.inputs + self.output)
        for name in self.adapted:
            first, second = self.adapter(name)
            elements += first + 2 * second + first * (inside if name == "o_proj" else below)
        yield self.products("backward_products", elements)
        if self.runs_nha(layer):
            yield self.products("backward_products", self.gate(layer) * (gates + below), single=True)
        if inside:
            yield from self.mixing("backward", layer, backward=True)

    def mixing(self, which: str, layer: int, backward: bool) -> Iterator[Item]:
        """What mixes the tokens of the student in one layer; of windows that are drawn each counts its share."""
        part, choices = f"{which}_attention", self.windows[layer]
        count = floors.backward if backward else floors.forward
        for window in choices:
            if window is None:
                yield Item(part, self.softmax(layer, backward))
            else:
                work = count(self.shape(layer, window), self.stage.sequence_length, self.element)
                share = 1 / len(choices)
                yield Item(part, floors.Work(work.flops * share, work.bytes * share, work.io_bytes * share))

    # ---- sizes ---------------------------------------------------------------------------------
    def products(self, part: str, elements: float, single: bool = False) -> Item:
        """Products of one token with matrices of so many elements."""
        return Item(part, floors.Work(2 * elements, 0, 0), single)

    def softmax(self, layer: int, backward: bool) -> floors.Work:
        """The base model's own attention."""
        count = floors.softmax_backward if backward else floors.softmax_forward
        return count(self.shape(layer, 0), self.stage.sequence_length, self.reach[layer], self.element)

    def gate(self, layer: int) -> int:
        """Elements of a layer's gate matrix."""
        return self.sizes.hidden * self.sizes.groups * (self.slots[layer] + (self.recipe.nha.gate == "routed"))

    def shape(self, layer: int, window: int) -> floors.Shape:
        """A layer as the floors know it; sinks are seen like tokens of the window."""
        sizes, seen = self.sizes, window + self.recipe.nha.sinks
        return floors.Shape(sizes.family, sizes.heads, sizes.groups, sizes.head_dim, self.slots[layer], seen)

    def runs_nha(self, layer: int) -> bool:
        """Whether the student's layer runs NHA in this stage."""
        return self.windows[layer] != [None]

    def learns(self, layer: int) -> bool:
        """Whether anything of a layer is trained."""
        return bool(self.trains_attention or self.adapted or (self.trains_gates and self.runs_nha(layer)))

    def feed_forward(self, layer: int) -> int:
        """Elements of the feed-forward matrices that one token meets, its router's included."""
        sizes = self.sizes
        if layer not in self.sparse:
            return 3 * sizes.hidden * sizes.intermediate
        return sizes.hidden * (3 * sizes.experts_per_token * sizes.expert_size + sizes.experts)

    def adapter(self, name: str) -> tuple[int, int]:
        """Elements of the two matrices of a projection's adapter: into the rank, and out of it."""
        rows, columns = self.sizes.projections[name]
        return self.stage.lora.rank * rows, self.stage.lora.rank * columns
