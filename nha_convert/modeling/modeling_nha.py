"""Every family with NHA layers: the base classes, a different attention, a different cache.

The classes `NHA<Family>Model` and `NHA<Family>ForCausalLM` are made from the table of families.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers import initialization as init
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from nha_convert.families import FAMILIES, Family

from .attention_nha import ATTENTIONS, NHAGate
from .cache_nha import NHACache, check_cache
from .configuration_nha import CONFIGS, FULL, is_window

Window = int | str | None
CACHE_IMPLEMENTATIONS = (None, "dynamic", "offloaded")


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

    def new_cache(self, offloading: bool = False) -> NHACache:
        """An empty cache for this model in its present mode and with its present windows.

        Args:
            offloading: keep the keys and values of full-attention layers on the CPU between their turns.
        Raises:
            ValueError: offloading of a model that is not on a CUDA device, which is what `transformers` can do.
        """
        if offloading and self.device.type != "cuda":  # type: ignore[attr-defined]
            raise ValueError(
                f"an offloaded cache needs a model on a CUDA device, this one is on "
                f"{self.device}: leave cache_implementation unset"  # type: ignore[attr-defined]
            )
        return NHACache(self.config, self._student_layers(), offloading)  # type: ignore[attr-defined]

    def set_windows(self, windows: Window | Sequence[Window] | Mapping[int, Window]) -> None:
        """Change how many exact tokens NHA layers see, without retraining; `config.nha_windows` follows.

        Caches made before do not fit any more, and say so.

        Args:
            windows: one value for every NHA layer; or one per layer of the model; or {layer: value} for some. A value
                is an integer >= 0 (0 is a pure linear RNN) or "full": the base model's own attention, with a growing
                cache. Layers that were never converted stay full and take "full" or None.
        Raises:
            ValueError: a value is no window, a list does not have one entry per layer, or a layer does not exist or
                has no gates and so cannot become an NHA layer.
        Source: arXiv 2510.07019, section 3 (the window is a choice at inference).
        """
        layers = self._nha_layers()
        count = self.config.num_hidden_layers  # type: ignore[attr-defined]
        wanted = _windows_by_layer(windows, count, layers)
        merged = list(self.config.nha_windows)  # type: ignore[attr-defined]
        for index, window in wanted.items():
            if index in layers:
                layers[index].nha_window = None if window == FULL else window
                merged[index] = window
        self.config.nha_windows = merged  # type: ignore[attr-defined]

    def _nha_layers(self) -> dict[int, Any]:
        """Attention modules by layer of the layers that have gates; quicker than `nha_layers`, for every step."""
        decoder: Any = getattr(self, "model", self)
        attentions = ((index, getattr(layer, "self_attn", None)) for index, layer in enumerate(decoder.layers))
        return {index: attention for index, attention in attentions if hasattr(attention, "nha_window")}

    def _student_layers(self) -> list[int]:
        return [index for index, attention in self._nha_layers().items() if attention.runs_nha]


def _windows_by_layer(
    windows: Window | Sequence[Window] | Mapping[int, Window], count: int, converted: Mapping[int, Any]
) -> dict[int, Window]:
    """`windows` as {layer: value}, checked; `converted` holds the layers that have gates."""
    if isinstance(windows, Mapping):
        wanted = dict(windows)
    elif isinstance(windows, Sequence) and not isinstance(windows, str):
        if len(windows) != count:
            raise ValueError(f"windows has {len(windows)} entries, but the model has {count} layers: give one for each")
        wanted = dict(enumerate(windows))
    else:
        wanted = dict.fromkeys(converted, windows)
        if not is_window(windows):
            raise ValueError(f"the window is {windows!r}: it must be 'full' or an integer >= 0")
    for index, window in wanted.items():
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < count:
            raise ValueError(f"there is no layer {index!r}: the model has layers 0 to {count - 1}")
        if index in converted and not is_window(window):
            raise ValueError(f"the window of layer {index} is {window!r}: it must be 'full' or an integer >= 0")
        if index not in converted and window not in (FULL, None):
            raise ValueError(
                f"layer {index} was kept as full attention when the model was converted and has no gates, so its "
                f"window cannot be {window!r}: leave it 'full', or convert the model again with that layer"
            )
    return wanted


class NHAModelMixin(NHAPreTrainedMixin):
    """Gives a base decoder NHA layers where the configuration has a window, and their inputs."""

    attention_class: type
    """The family's attention with NHA."""

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
            position_ids: [B or 1, T]. Without mask and cache, a step other than 1 starts a new document in its row.
            past_key_values: a cache from `new_cache()`; made here when `use_cache` asks for one.
            use_cache: default: the configuration's, but off while training and for packed documents.
        Raises:
            ValueError: a mask that is not 2D, packed documents with a cache, `cu_seq_lens_q` with B > 1, or a cache
                without NHA states.
        """
        if self._nha_layers():
            packed = kwargs.get("cu_seq_lens_q")
            if packed is not None and position_ids is None:
                position_ids = _positions_of(packed)
            rows, length = (inputs_embeds if input_ids is None else input_ids).shape[:2]  # type: ignore[union-attr]
            if use_cache is None:
                several = (
                    attention_mask is None
                    and past_key_values is None
                    and _document_boundaries(position_ids, packed, rows) is not None
                )
                use_cache = self.config.use_cache and not self.training and not several  # type: ignore[attr-defined]
            if past_key_values is None and use_cache:
                past_key_values = self.new_cache()
            attention_mask = self._prepare_nha(attention_mask, position_ids, past_key_values, (rows, length), kwargs)
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
        shape: tuple[int, int],
        kwargs: dict[str, Any],
    ) -> torch.Tensor | None:
        """Put what NHA layers read of inputs of `shape` (B, T) into `kwargs`; return the mask for the other layers."""
        students = self._student_layers()
        if past_key_values is not None:
            check_cache(past_key_values, students)
            if kwargs.get("cu_seq_lens_q") is not None:
                raise ValueError("packed documents (cu_seq_lens_q) cannot be read with a cache: pass use_cache=False")
        padding = _padding_mask(attention_mask, shape[1])
        if padding is not None:
            kwargs["nha_padding_mask"] = padding
        elif attention_mask is None and past_key_values is None:
            boundaries = _document_boundaries(position_ids, kwargs.get("cu_seq_lens_q"), shape[0])
            if boundaries is not None:
                kwargs["nha_cu_seqlens"] = boundaries
        if len(students) == self.config.num_hidden_layers:  # type: ignore[attr-defined]
            return torch.ones(1, 1, 1, 1, dtype=torch.bool)  # no layer reads it: spare the base model a T x T mask
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


def _document_boundaries(
    position_ids: torch.Tensor | None, given: torch.Tensor | None, rows: int
) -> torch.Tensor | None:
    """int32 boundaries [N + 1] of packed documents in the rows laid end to end; None where each row is one document.

    Args:
        position_ids: [B or 1, T]; a step other than 1 starts a new document, as `transformers` reads it.
        given: boundaries of one row, which position ids need not repeat.
        rows: B.
    Raises:
        ValueError: boundaries were given for more than one row.
    """
    if given is not None:
        if rows != 1:
            raise ValueError(
                f"cu_seq_lens_q describes one row, got a batch of {rows} rows: flatten the batch, or pass position_ids "
                "that start anew at each document"
            )
        return given
    if position_ids is None:
        return None
    jumps = position_ids.diff(dim=-1) != 1  # [B, T - 1]
    if not bool(jumps.any()):
        return None
    first = jumps.new_ones(len(position_ids), 1)
    starts = torch.cat((first, jumps), 1).expand(rows, -1).flatten().nonzero().flatten()
    return torch.cat((starts, starts.new_full((1,), rows * position_ids.shape[1]))).to(torch.int32)


class NHAForCausalLMMixin(NHAPreTrainedMixin):
    """A language model over an NHA decoder: construction, generation, and what cannot be generated with."""

    model_class: type

    def __init__(self, config: Any) -> None:
        with torch.device("meta"):  # what the family sets on itself; its decoder and head are replaced below
            super().__init__(config)  # type: ignore[call-arg]
        self.model = self.model_class(config)
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
        if students and implementation not in CACHE_IMPLEMENTATIONS:
            raise ValueError(
                f"cache_implementation={implementation!r} cannot hold NHA states, which are of constant size anyway: "
                "leave it unset, or take 'offloaded' for the full-attention layers"
            )
        if students and getattr(generation_config, "is_assistant", False):
            raise ValueError("an NHA model cannot be the assistant of assisted decoding: its cache cannot be cropped")
        given = model_kwargs.get("past_key_values")
        if given is not None and students:
            check_cache(given, students)
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]
        if given is None and model_kwargs.get("past_key_values") is not None:
            model_kwargs["past_key_values"] = self.new_cache(offloading=implementation == "offloaded")

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """The next step's inputs. Where every layer runs NHA, mask and positions of the last column alone: nothing
        reads the earlier ones, and tensors that grow would make every step of a long decode slower.
        """
        updated: dict[str, Any] = super()._update_model_kwargs_for_generation(  # type: ignore[misc]
            outputs, model_kwargs, *args, **kwargs
        )
        constant = updated.get("past_key_values") is not None
        if constant and len(self._student_layers()) == self.config.num_hidden_layers:  # type: ignore[attr-defined]
            for name in ("attention_mask", "position_ids"):
                if updated.get(name) is not None:
                    updated[name] = updated[name][..., -1:]
        return updated

    @property
    def init_continuous_batching(self) -> Any:
        """Absent on purpose: continuous batching would run without the NHA states, silently wrong."""
        raise AttributeError("continuous batching is not possible with NHA layers: use generate()")


def _model_classes(family: Family) -> tuple[Any, Any]:
    """The decoder and the language model of a family."""
    base = getattr(transformers, f"{family.prefix}ForCausalLM")
    shared = {
        "config_class": CONFIGS[family.model_type],
        "__module__": __name__,
        # read from the source of a class's module, which here is another than the experts'
        "_can_set_experts_implementation": classmethod(lambda cls: base._can_set_experts_implementation()),
    }
    model = type(
        f"NHA{family.prefix}Model",
        (NHAModelMixin, getattr(transformers, f"{family.prefix}Model")),
        shared
        | {"attention_class": ATTENTIONS[family.model_type], "__doc__": f"Decoder of {family.models} with NHA layers."},
    )
    language_model = type(
        f"NHA{family.prefix}ForCausalLM",
        (NHAForCausalLMMixin, base),
        shared | {"model_class": model, "__doc__": f"Language model of {family.models} with NHA layers."},
    )
    return model, language_model


def _keep_conversion(family: Family) -> None:
    """Checkpoints of the family may store tensors otherwise than its model holds them, as experts are."""
    conversion = get_checkpoint_conversion_mapping(family.model_type)
    if conversion:
        register_checkpoint_conversion_mapping(family.nha_model_type, conversion, overwrite=True)


for _family in FAMILIES.values():
    _keep_conversion(_family)
MODELS = {family.model_type: _model_classes(family) for family in FAMILIES.values()}
"""(decoder, language model) by the base family's `model_type`; each is also an attribute of this module."""
globals().update({made.__name__: made for pair in MODELS.values() for made in pair})
