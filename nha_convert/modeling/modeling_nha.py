"""Llama, Qwen2 and Qwen3 with NHA layers: the base classes, a different attention, a different cache."""

from typing import Any

import torch
from torch import nn
from transformers import (
    DynamicCache,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3ForCausalLM,
    Qwen3Model,
)
from transformers import initialization as init

from .attention_nha import NHAGate, NHALlamaAttention, NHAQwen2Attention, NHAQwen3Attention, nha_layers
from .cache_nha import build_cache, check_cache
from .configuration_nha import NHALlamaConfig, NHAQwen2Config, NHAQwen3Config


class NHAPreTrainedMixin:
    """What the bare model and the language model share."""

    _is_stateful = True  # declines assisted decoding
    _can_compile_fullgraph = False
    _keep_in_fp32_modules_strict = ["nha"]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        if isinstance(module, NHAGate):
            if module.slot_q_scale is not None:
                init.ones_(module.slot_q_scale)
            if module.slot_bias is not None:
                init.zeros_(module.slot_bias)

    def new_cache(self) -> DynamicCache:
        """An empty cache for this model in its present mode."""
        return build_cache(self.config, self._student_layers())  # type: ignore[attr-defined]

    def _student_layers(self) -> list[int]:
        return [index for index, module in nha_layers(self) if module.nha_mode == "student"]  # type: ignore[arg-type]


class NHAModelMixin(NHAPreTrainedMixin):
    """Gives a base decoder NHA layers where the configuration has a window, and their inputs."""

    attention_class: type

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        for window, layer in zip(config.nha_windows, self.layers, strict=True):  # type: ignore[attr-defined]
            if window is not None:
                layer.self_attn.__class__ = self.attention_class
                layer.self_attn.init_nha(config, window)
                layer.self_attn._is_hf_initialized = False
        self.post_init()  # type: ignore[attr-defined]

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's forward pass.

        Args:
            attention_mask: [B, past + T], 1 = real token; padding may stand anywhere.
            position_ids: [B or 1, T]. With B = 1, no mask and no cache, a step other than 1 starts a new document.
            past_key_values: a cache from `new_cache()`; made here when `use_cache` asks for one.
            use_cache: default: the configuration's, but off while training and for packed documents.
        Raises:
            ValueError: a mask that is not 2D, packed documents with B > 1 or a cache, or a cache without
                NHA states.
        """
        if nha_layers(self):  # type: ignore[arg-type]
            packed = kwargs.get("cu_seq_lens_q")
            if packed is not None and position_ids is None:
                position_ids = _positions_of(packed)
            if use_cache is None:
                several = (
                    attention_mask is None
                    and past_key_values is None
                    and _document_boundaries(position_ids, packed) is not None
                )
                use_cache = self.config.use_cache and not self.training and not several  # type: ignore[attr-defined]
            if past_key_values is None and use_cache:
                past_key_values = self.new_cache()
            length = (inputs_embeds if input_ids is None else input_ids).shape[1]  # type: ignore[union-attr]
            attention_mask = self._prepare_nha(attention_mask, position_ids, past_key_values, length, kwargs)
        return super().forward(  # type: ignore[misc]
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )

    def _prepare_nha(
        self,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        past_key_values: Any,
        length: int,
        kwargs: dict[str, Any],
    ) -> torch.Tensor | None:
        """Put what NHA layers read into `kwargs`, which reach them; return the mask for the other layers."""
        students = self._student_layers()
        if past_key_values is not None:
            check_cache(past_key_values, students)
            if kwargs.get("cu_seq_lens_q") is not None:
                raise ValueError("packed documents (cu_seq_lens_q) cannot be read with a cache: pass use_cache=False")
        padding = _padding_mask(attention_mask, length)
        if padding is not None:
            kwargs["nha_padding_mask"] = padding
        elif attention_mask is None and past_key_values is None:
            boundaries = _document_boundaries(position_ids, kwargs.get("cu_seq_lens_q"))
            if boundaries is not None:
                kwargs["nha_cu_seqlens"] = boundaries
        if attention_mask is not None and len(students) == self.config.num_hidden_layers:  # type: ignore[attr-defined]
            return torch.ones_like(attention_mask)  # no layer reads it: spare the base model a T x T mask
        return attention_mask


def _padding_mask(attention_mask: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """[B, T] bool for the present tokens, or None when all are real.

    Raises:
        ValueError: `attention_mask` is not 2D.
    """
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
        found = (
            list(attention_mask.shape) if isinstance(attention_mask, torch.Tensor) else type(attention_mask).__name__
        )
        raise ValueError(f"NHA layers need a 2D attention_mask [batch, past + tokens], 1 = real token; got {found}")
    padding = attention_mask[:, -length:].bool()
    return None if bool(padding.all()) else padding


def _positions_of(boundaries: torch.Tensor) -> torch.Tensor:
    """position_ids [1, T] that start anew at each of the boundaries [N + 1]."""
    return torch.cat([torch.arange(int(length), device=boundaries.device) for length in boundaries.diff()])[None]


def _document_boundaries(position_ids: torch.Tensor | None, given: torch.Tensor | None) -> torch.Tensor | None:
    """int32 boundaries [N + 1] of packed documents: `given`, or read from position ids as `transformers` does.

    Raises:
        ValueError: several documents in a batch of more than one row.
    """
    if given is not None:
        return given
    if position_ids is None:
        return None
    jumps = position_ids.diff(dim=-1) != 1  # [B, T - 1]
    if not bool(jumps.any()):
        return None
    if position_ids.shape[0] != 1:
        raise ValueError(f"packed documents need a batch of 1 row, got {position_ids.shape[0]}: flatten the batch")
    starts = jumps[0].nonzero().flatten() + 1
    ends = [starts.new_zeros(1), starts, starts.new_full((1,), position_ids.shape[1])]
    return torch.cat(ends).to(torch.int32)


class NHAForCausalLMMixin(NHAPreTrainedMixin):
    """A language model over an NHA decoder: construction, generation, and what cannot be generated with."""

    model_class: type

    def __init__(self, config: Any) -> None:
        PreTrainedModel.__init__(self, config)
        self.model = self.model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[attr-defined]

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Give `generate` a cache with NHA states.

        Raises:
            ValueError: another cache implementation was asked for, the given cache has no NHA states, or this model
                is to draft for another.
        """
        students = self._student_layers()
        implementation = generation_config.cache_implementation
        if students and implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={implementation!r} cannot hold NHA states, which are of constant size anyway: "
                "leave it unset"
            )
        if students and getattr(generation_config, "is_assistant", False):
            raise ValueError("an NHA model cannot be the assistant of assisted decoding: its cache cannot be cropped")
        given = model_kwargs.get("past_key_values")
        if given is not None and students:
            check_cache(given, students)
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]
        if given is None and model_kwargs.get("past_key_values") is not None:
            model_kwargs["past_key_values"] = self.new_cache()

    @property
    def init_continuous_batching(self) -> Any:
        """Absent on purpose: continuous batching would run without the NHA states, silently wrong."""
        raise AttributeError("continuous batching is not possible with NHA layers: use generate()")


class NHALlamaModel(NHAModelMixin, LlamaModel):
    """Llama decoder with NHA layers."""

    config_class = NHALlamaConfig
    attention_class = NHALlamaAttention


class NHALlamaForCausalLM(NHAForCausalLMMixin, LlamaForCausalLM):
    """Llama language model with NHA layers."""

    config_class = NHALlamaConfig
    model_class = NHALlamaModel


class NHAQwen2Model(NHAModelMixin, Qwen2Model):
    """Qwen2 decoder with NHA layers."""

    config_class = NHAQwen2Config
    attention_class = NHAQwen2Attention


class NHAQwen2ForCausalLM(NHAForCausalLMMixin, Qwen2ForCausalLM):
    """Qwen2 language model with NHA layers."""

    config_class = NHAQwen2Config
    model_class = NHAQwen2Model


class NHAQwen3Model(NHAModelMixin, Qwen3Model):
    """Qwen3 decoder with NHA layers."""

    config_class = NHAQwen3Config
    attention_class = NHAQwen3Attention


class NHAQwen3ForCausalLM(NHAForCausalLMMixin, Qwen3ForCausalLM):
    """Qwen3 language model with NHA layers."""

    config_class = NHAQwen3Config
    model_class = NHAQwen3Model


__all__ = [
    "NHALlamaForCausalLM",
    "NHALlamaModel",
    "NHAQwen2ForCausalLM",
    "NHAQwen2Model",
    "NHAQwen3ForCausalLM",
    "NHAQwen3Model",
]
