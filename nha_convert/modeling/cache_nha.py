"""The cache of a converted model: an `NHAState` per NHA layer, a growing KV cache per full-attention layer."""

from collections.abc import Iterable
from typing import Any

import torch
from nha_kernels.state import NHAState
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin


class NHACacheLayer(CacheLayerMixin):
    """One NHA layer's entry in a `DynamicCache`.

    Attributes:
        state: the layer's recurrent state, None until the first forward pass.
        seen: columns of input seen so far, padding included: what `transformers` calls the sequence length.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False
    is_nha = True

    def __init__(self) -> None:
        super().__init__()
        self.state: NHAState | None = None
        self.seen = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the first forward pass makes the state."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Refuse keys and values: only an NHA layer in student mode may advance this state.

        Raises:
            ValueError: always; the layer runs the teacher's attention on a student's cache.
        """
        raise ValueError(
            "this cache holds an NHA state for a layer that runs softmax attention: make the cache in the mode it is "
            "used in (model.new_cache() inside teacher_mode), or pass no cache"
        )

    def advance(self, state: NHAState, tokens: int) -> None:
        """Store the state after `tokens` further columns of input."""
        self.state = state
        self.seen += tokens
        self.is_initialized = True

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def reset(self) -> None:
        self.state, self.seen, self.is_initialized = None, 0, False

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        if self.state is not None:
            self.state = self.state.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            self.state = self.state.repeat(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.state is not None:
            self.state = self.state.select(indices)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: absorbed tokens cannot be taken out of the slots again.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "an NHA cache cannot be cropped: absorbed tokens cannot be taken out of the slots again; assisted and "
            "prompt-lookup decoding need that, so generate without an assistant"
        )

    def activate_past_recording(self) -> None:
        self.crop()

    def offload(self) -> None:
        raise ValueError("an NHA cache cannot be offloaded, and is small enough not to need it")

    prefetch = offload


def build_cache(config: PretrainedConfig, nha_layers: Iterable[int]) -> DynamicCache:
    """A `DynamicCache` for `config` with an `NHACacheLayer` at each index of `nha_layers`."""
    cache = DynamicCache(config=config)
    for index in nha_layers:
        cache.layers[index] = NHACacheLayer()
    return cache


def check_cache(cache: Cache, nha_layers: Iterable[int]) -> None:
    """Refuse a cache that an NHA model cannot use.

    Raises:
        ValueError: the cache has no NHA state for one of `nha_layers`, or is offloaded.
    """
    if getattr(cache, "offloading", False):
        raise ValueError("an offloaded cache cannot hold NHA states: pass model.new_cache() or no cache")
    layers = getattr(cache, "layers", [])
    for index in nha_layers:
        if index >= len(layers) or not getattr(layers[index], "is_nha", False):
            raise ValueError(
                f"layer {index} is an NHA layer, but the given {type(cache).__name__} has no NHA state for it: "
                "pass model.new_cache(), a cache that this model returned, or none"
            )
