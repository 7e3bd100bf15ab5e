"""Gates that start from text: one pass of the teacher, each layer calibrated while its inputs are there."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .data import training_dataset
from .devices import input_device
from .errors import InputError
from .far_attention import attention_by_distance, own_windows, received_attention
from .gate_attended import POWER, attended_gates, coherence, routed_gates
from .gate_calibration import GateStart, LayerInputs, calibrated, cluster_gates
from .gate_init import layer_horizons, layer_seed
from .modeling.attention_nha import nha_layers, teacher_mode
from .recipe import Recipe
from .settings import NHASettings
from .settings_types import NEEDS_TEXT, calibration_rows

GATES = "gates.safetensors"
"""In a run folder: the gates as they start, where they start from text."""
SEARCH_SEQUENCES = 4
"""The first of them, against which gates are scaled."""


def calibration_ids(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, quiet: bool = True) -> torch.Tensor:
    """The first windows of the first stage's text, a function of seed, text and settings.

    Returns:
        int64 [N, T]: windows of the stage's length, or of `evaluate.sequence_length` where nothing is trained; N is
        `calibration_rows`, also where the stage itself reads fewer; a text that is shorter is read again.
    Raises:
        InputError, WorkError: as `training_dataset`.
    """
    length = recipe.training_length or recipe.evaluate.sequence_length
    count = calibration_rows(length, recipe.nha.gate_init_rows)
    stage: dict[str, Any] = {"kind": "align", "tokens": count * length, "sequence_length": length}
    if recipe.stages:
        stage = recipe.stages[0].model_dump()
        stage["tokens"] = max(stage["tokens"], count * length)
    stage["batch_size"] = 1
    fields = recipe.model_dump() | {"stages": [stage]}
    fields["data"]["packing"] = "windows"
    fields["runtime"]["layers_at_once"] = None
    rows = training_dataset(Recipe.model_validate(fields), 0, tokenizer, quiet=quiet)
    return torch.stack([rows[index]["input_ids"] for index in range(count)])


@torch.no_grad()
def calibrate_gates(model: Any, nha: NHASettings, ids: torch.Tensor, *, seed: int) -> None:
    """Start the gates of every layer that runs NHA from what it sees in the teacher's pass over `ids`.

    Args:
        model: the student with gates as `load_student` made them, its backbone untouched.
        nha: its settings, with one of `NEEDS_TEXT` as `gate_init`.
        ids: int64 [N, T]; T is the length that horizons reach to.
        seed: as in `init_gates`.
    Raises:
        InputError: fewer tokens than slots.
        ValueError: `gate_init` is another.
    """
    method = nha.gate_init
    if method not in NEEDS_TEXT:
        raise ValueError(f"gate_init is {method!r}: only {', '.join(NEEDS_TEXT)} look at text")
    tokens = len(ids) * max(0, ids.shape[1] - nha.sinks)
    most = max(nha.slots_by_layer(model.config.num_hidden_layers))
    if tokens < most:
        raise InputError(
            f"nha.gate_init {method} looks at {tokens} tokens behind the sinks, fewer than nha.slots = {most}; "
            "raise nha.gate_init_rows or stages.0.sequence_length, or lower nha.slots"
        )
    training = model.training
    decoder = getattr(model.eval(), model.base_model_prefix)

    def start(layer: Any, inputs: LayerInputs, index: int) -> None:
        horizons = layer_horizons(layer.nha_window, nha.gate_horizons, ids.shape[1])
        _set(layer, layer_start(layer, inputs, method, horizons, layer_seed(seed, index)))

    with teacher_mode(model), ExitStack() as hooks:
        for index, layer in nha_layers(model):
            if layer.nha_window is not None:
                watch_layer(layer, hooks, lambda inputs, layer=layer, index=index: start(layer, inputs, index))
        decoder(input_ids=ids.to(input_device(model)), use_cache=False)
    model.train(training)


def watch_layer(layer: Any, hooks: ExitStack, use: Any) -> None:
    """Until `hooks` are closed, `use(LayerInputs)` is called whenever the layer has run in teacher mode."""
    kept: dict[str, torch.Tensor] = {}
    config = layer.config
    own = own_windows(config)[layer.layer_idx]

    def heads(module: Any, args: Any) -> None:
        kept["heads"] = args[0]

    def after(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        query, key, value = layer._nha_projections(hidden)
        cos, sin = kwargs["position_embeddings"]
        use(
            LayerInputs(
                hidden=hidden,
                query=query,
                key=key,
                value=value,
                cos=cos,
                sin=sin,
                heads=kept.pop("heads").view_as(query),
                output_weight=layer.o_proj.weight,
                window=layer.nha_window,
                sinks=config.nha_sinks,
                scale=layer.scaling,
                mask_empty=config.nha_mask_empty,
                tau=layer.nha.tau,
                own_window=own,
                slot_rotary=config.nha_slot_rotary,
            )
        )

    hooks.callback(layer.o_proj.register_forward_pre_hook(heads).remove)
    hooks.callback(layer.register_forward_hook(after, with_kwargs=True).remove)


def layer_start(layer: Any, inputs: LayerInputs, method: str, horizons: tuple[float, float], seed: int) -> GateStart:
    """One layer's gates by `clusters`; or by `calibrated` or `attended`, which are scaled to the teacher's output."""
    gate = layer.nha
    absorbed = slice(inputs.sinks, None)  # sinks never meet the slots
    hidden, keys = inputs.hidden[:, absorbed].flatten(0, 1), inputs.key[:, absorbed].flatten(0, 1)
    options: dict[str, Any] = {"slots": gate.slots, "seed": seed}
    heads, dim = inputs.query.shape[2:]
    query_scale, slot_bias = torch.ones(heads, dim), torch.zeros(heads)
    if method == "attended":
        received, channels = _far_attention(inputs)
        if gate.slot_q_scale is not None or inputs.slot_rotary:
            keys = keys * channels.unflatten(0, (gate.groups, -1)).mean(1)
        if gate.slot_q_scale is not None and not inputs.slot_rotary:  # rotated products know their distance
            query_scale = channels
        seen = hidden, keys, received[:, absorbed].flatten(0, 1)
        if gate.write_proj is None:
            start = GateStart(*attended_gates(*seen, tau=gate.tau, **options), query_scale, slot_bias)
        else:
            weight, bias, write_weight, write_bias = routed_gates(*seen, **options)
            start = GateStart(weight, bias, query_scale, slot_bias, write_weight, write_bias)
    else:
        key_weight = layer.k_proj.weight
        if hasattr(layer, "k_norm"):
            key_weight = key_weight * layer.k_norm.weight.repeat(gate.groups)[:, None]
        gates = cluster_gates(hidden, keys, key_weight, tau=gate.tau, horizons=horizons, **options)
        start = GateStart(*gates, query_scale, slot_bias)
    if method == "clusters":
        return start.to("cpu")
    learned = {"with_query_scale": gate.slot_q_scale is not None, "with_slot_bias": gate.slot_bias is not None}
    return calibrated(inputs.first(SEARCH_SEQUENCES), start, **learned)


def _far_attention(inputs: LayerInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, T, G] attention that each token is given from beyond the student's window, [H, D] coherence across it."""
    query, key = inputs.rotated()
    beyond = (query, key, inputs.scale, inputs.window, inputs.sinks)
    received = received_attention(*beyond, own=inputs.own_window, power=POWER)
    distances = attention_by_distance(*beyond, own=inputs.own_window)
    return received, coherence(distances, inputs.cos[0], query.shape[-1])


def _set(layer: Any, start: GateStart) -> None:
    gate = layer.nha
    gate.gate_proj.weight.copy_(start.weight)
    gate.gate_proj.bias.copy_(start.bias)
    if gate.write_proj is not None:
        gate.write_proj.weight.copy_(start.write_weight)
        gate.write_proj.bias.copy_(start.write_bias)
    if gate.slot_q_scale is not None:
        gate.slot_q_scale.copy_(start.slot_q_scale)
    if gate.slot_bias is not None:
        gate.slot_bias.copy_(start.slot_bias)
