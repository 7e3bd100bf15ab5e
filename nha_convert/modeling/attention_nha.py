"""Native Hybrid Attention as a mixin over the base family's attention module.

Shapes: B batch, T time, H query heads, G key/value heads, D head_dim, M slots.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from nha_kernels.gates import log_decay_from_logits, log_decay_from_routing
from nha_kernels.ops import nha_attention, nha_decode
from nha_kernels.rotary import rotate
from torch import nn
from torch.nn import functional
from transformers import PretrainedConfig
from transformers.cache_utils import Cache

from nha_convert.families import FAMILIES, Family

from .configuration_nha import FULL

MODES = ("student", "teacher")
BRANCHES = ("both", "window", "slots", "none")


class Float32Linear(nn.Linear):
    """A linear layer computed in fp32, whatever its weight's dtype or an active autocast."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return functional.linear(input.float(), self.weight.float(), self.bias.float())


class NHAGate(nn.Module):
    """All parameters that an NHA layer adds to the base model's attention, made in fp32.

    Attributes:
        gate_proj: hidden -> G * M gate logits; with routed gates, of the softmax over a head's slots.
        write_proj: hidden -> G logits of the strength that a token is written with; None with independent gates.
        slot_q_scale: [H, D] scale of the queries that meet the slots (starts at 1), or None.
        slot_bias: [H] bias of the slots' scores (starts at 0), or None.
    """

    slot_q_scale: nn.Parameter | None
    slot_bias: nn.Parameter | None

    def __init__(self, config: Any, head_dim: int, layer: int) -> None:
        super().__init__()
        heads, self.groups, self.slots = config.num_attention_heads, config.num_key_value_heads, config.slots_of(layer)
        self.tau = config.nha_tau
        self.gate_proj = Float32Linear(config.hidden_size, self.groups * self.slots, dtype=torch.float32)
        routed = config.nha_gate == "routed"
        self.write_proj = Float32Linear(config.hidden_size, self.groups, dtype=torch.float32) if routed else None
        scale = torch.ones(heads, head_dim, dtype=torch.float32)
        bias = torch.zeros(heads, dtype=torch.float32)
        self.register_parameter("slot_q_scale", nn.Parameter(scale) if config.nha_slot_query_scale else None)
        self.register_parameter("slot_bias", nn.Parameter(bias) if config.nha_slot_bias else None)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Gate one layer's input.

        Args:
            hidden_states: [B, T, hidden].
        Returns:
            log_decay [B, T, G, M] fp32, slot_q_scale [H, D] fp32 or None, slot_bias [H] fp32 or None.
        """
        logits = self.gate_proj(hidden_states).unflatten(-1, (self.groups, self.slots))  # [B,T,G,M]
        scale = None if self.slot_q_scale is None else self.slot_q_scale.float()
        bias = None if self.slot_bias is None else self.slot_bias.float()
        if self.write_proj is None:
            return log_decay_from_logits(logits, self.tau), scale, bias
        return log_decay_from_routing(self.write_proj(hidden_states), logits), scale, bias


class NHAAttentionMixin:
    """Runs NHA in student mode and the base class's attention in teacher mode, on the same projections.

    `attention_dropout` applies in teacher mode only.

    Attributes:
        nha_window: exact tokens each query sees; None runs the base class's attention, as `window: full` means.
        nha_mode: "student", or "teacher" for the base model's own attention.
        nha_branch: "both", "window" (slots masked), "slots" (nothing but the slots) or "none" (the output is zero).
        nha: the `NHAGate`.
    """

    config: Any
    layer_idx: int
    head_dim: int
    scaling: float
    nha_window: int | None
    nha_mode: str
    nha_branch: str
    nha: NHAGate

    def init_nha(self, config: PretrainedConfig, window: int | str) -> None:
        """Turn a constructed base attention module into an NHA layer."""
        self.nha_window = None if window == FULL else int(window)
        self.nha_mode, self.nha_branch = "student", "both"
        self.nha = NHAGate(config, self.head_dim, self.layer_idx)

    @property
    def runs_nha(self) -> bool:
        """Whether the layer now runs NHA and keeps an `NHAState`: in student mode, with a window that is not full."""
        return self.nha_mode == "student" and self.nha_window is not None

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        nha_padding_mask: torch.Tensor | None = None,
        nha_cu_seqlens: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend.

        Args:
            hidden_states: [B, T, hidden].
            position_embeddings: cos and sin, each [B or 1, T, D].
            attention_mask: the base model's prepared mask; read by the base class's attention only.
            past_key_values: a cache from `model.new_cache()`.
            nha_padding_mask: [B, T] bool, True = real token.
            nha_cu_seqlens: int32 boundaries of packed documents in the B rows laid end to end.
        Returns:
            the output [B, T, hidden], and None (where the base class's attention runs: what that gives).
        Raises:
            ValueError: called by continuous batching, whose paged cache cannot hold NHA states, or with a cache that
                was filled with another window.
        """
        if kwargs.get("cache") is not None:
            raise ValueError("continuous batching is not possible with NHA layers: use generate()")
        window = self.nha_window
        if self.nha_mode == "teacher" or window is None:
            return super().forward(  # type: ignore[misc]
                hidden_states=hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        query, key, value, cos, sin = self._nha_inputs(hidden_states, position_embeddings)
        log_decay, slot_q_scale, slot_bias = self.nha(hidden_states)
        entry = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        if nha_cu_seqlens is not None:
            query, key, value, log_decay = (end_to_end(x) for x in (query, key, value, log_decay))  # [1,B*T,...]
            if cos is not None and sin is not None:
                cos, sin = (end_to_end(x.expand(len(hidden_states), -1, -1)) for x in (cos, sin))
        options: dict[str, Any] = {
            "cos": cos,
            "sin": sin,
            "scale": self.scaling,
            "mask_empty": self.config.nha_mask_empty,
            "slot_q_scale": slot_q_scale,
            "slot_bias": slot_bias,
            "padding_mask": nha_padding_mask,
            "branch": "both" if self.nha_branch == "none" else self.nha_branch,
        }
        state = None if entry is None else entry.state_for(self, hidden_states.device)
        if state is not None and hidden_states.shape[1] == 1 and not torch.is_grad_enabled():
            output = nha_decode(query, key, value, log_decay, state, **options)  # [B,1,H,D]
        else:
            output, state = nha_attention(
                query,
                key,
                value,
                log_decay,
                window=window,
                sinks=self.config.nha_sinks,
                cu_seqlens=nha_cu_seqlens,
                initial_state=state,
                output_final_state=entry is not None,
                **options,
            )  # [B,T,H,D]
        if entry is not None:
            entry.advance(state, hidden_states.shape[1])
        if self.nha_branch == "none":
            return torch.zeros_like(hidden_states), None
        return self.o_proj(output.reshape(*hidden_states.shape[:2], -1)), None  # type: ignore[attr-defined]

    def _nha_inputs(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """What the op takes: query [B,T,H,D], key, value [B,T,G,D], cos and sin.

        The slots see what the op is given and the window sees it rotated. Where the slots are to see rotated keys, too
        (`nha_slot_rotary`), they are rotated here, and cos and sin are None.
        """
        query, key, value = self._nha_projections(hidden_states)
        cos, sin = position_embeddings
        if not self.config.nha_slot_rotary:
            return query, key, value, cos, sin
        turn = cos[:, :, None], sin[:, :, None]  # [B or 1,T,1,P]
        query, key = (rotate(x.to(cos.dtype), *turn).to(x.dtype) for x in (query, key))  # fp32 angles under autocast
        return query, key, value, None, None

    def _nha_projections(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Un-rotated queries [B,T,H,D] and keys, values [B,T,G,D], normalised as the base family does."""
        heads = (-1, self.head_dim)
        query = self.q_proj(hidden_states).unflatten(-1, heads)  # type: ignore[attr-defined]
        key = self.k_proj(hidden_states).unflatten(-1, heads)  # type: ignore[attr-defined]
        value = self.v_proj(hidden_states).unflatten(-1, heads)  # type: ignore[attr-defined]
        if hasattr(self, "q_norm"):
            query, key = self.q_norm(query), self.k_norm(key)  # type: ignore[attr-defined]
        return query, key, value


def end_to_end(x: torch.Tensor) -> torch.Tensor:
    """[1, B * T, ...] from [B, T, ...]."""
    return x.reshape(1, -1, *x.shape[2:])


def _attention_class(family: Family) -> type:
    base = getattr(
        import_module(f"transformers.models.{family.model_type}.modeling_{family.model_type}"),
        f"{family.prefix}Attention",
    )
    fields = {"__module__": __name__, "__doc__": f"The attention of {family.models} with NHA."}
    return type(f"NHA{family.prefix}Attention", (NHAAttentionMixin, base), fields)


ATTENTIONS = {family.model_type: _attention_class(family) for family in FAMILIES.values()}
"""Attention class by the base family's `model_type`."""


def nha_layers(model: nn.Module) -> list[tuple[int, Any]]:
    """Layer index and attention module of every NHA layer, in order; `model` may be wrapped (peft, DDP)."""
    found = [module for module in model.modules() if hasattr(module, "nha_window") and hasattr(module, "nha_mode")]
    return sorted(((module.layer_idx, module) for module in found), key=lambda pair: pair[0])  # type: ignore


@contextmanager
def _with_attribute(model: nn.Module, name: str, value: str) -> Iterator[None]:
    """Set one attribute of every NHA layer, and restore each layer's own value on the way out."""
    before = [(module, getattr(module, name)) for _, module in nha_layers(model)]
    try:
        for module, _ in before:
            setattr(module, name, value)
        yield
    finally:
        for module, old in before:
            setattr(module, name, old)


@contextmanager
def teacher_mode(model: nn.Module) -> Iterator[None]:
    """Inside, every NHA layer runs the base model's attention: the model is its teacher, bit for bit.

    Adapters stay active: disabling them is the caller's business.
    """
    with _with_attribute(model, "nha_mode", "teacher"):
        yield


@contextmanager
def branch_mode(model: nn.Module, branch: str) -> Iterator[None]:
    """Inside, every layer that runs NHA uses only `branch` of its attention.

    Raises:
        ValueError: `branch` is not one of `BRANCHES`.
    """
    if branch not in BRANCHES:
        raise ValueError(f"branch is {branch!r}: it must be one of {', '.join(BRANCHES)}")
    with _with_attribute(model, "nha_branch", branch):
        yield
