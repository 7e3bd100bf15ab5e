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
            "this cache holds an NHA state for a layer that runs full attention: make the cache with the windows, in "
            "the mode it is used in (model.new_cache() after set_windows, or inside teacher_mode), or pass no cache"
        )

    def state_for(self, layer: Any, device: torch.device) -> NHAState | None:
        """The state that `layer` goes on from, on `device`; None before the first forward pass.

        Raises:
            ValueError: the state was filled with another window.
        """
        if self.state is None:
            return None
        if self.state.window != layer.nha_window:
            raise ValueError(
                f"layer {layer.layer_idx} has a window of {layer.nha_window}, but the given cache was filled with a "
                f"window of {self.state.window}, and what its slots absorbed cannot be taken out again: set the "
                "windows before the prompt is read, and pass model.new_cache() or no cache"
            )
        if self.state.seen.device != device:
            self.state = self.state.to(device)
        return self.state

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
        """Move the state to the CPU; the next forward pass brings it back."""
        if self.state is not None:
            self.state = self.state.to("cpu")

    def prefetch(self) -> None:
        """Nothing to do ahead of time: `state_for` brings the state back."""


class NHACache(DynamicCache):
    """The cache of a converted model: an `NHACacheLayer` per layer that runs NHA, the base model's own layers else.

    With `offloading`, the keys and values of full-attention layers wait on the CPU; NHA states, which do not grow,
    stay where they are, as `transformers` keeps other recurrent states.
    """

    def __init__(self, config: PretrainedConfig, nha_layers: Iterable[int], offloading: bool = False) -> None:
        super().__init__(config=config, offloading=offloading)
        for index in nha_layers:
            self.layers[index] = NHACacheLayer()

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Refuse before any layer is cropped, where a layer runs NHA.

        Raises:
            ValueError: a layer holds an NHA state.
        """
        for layer in self.layers:
            if isinstance(layer, NHACacheLayer):
                layer.crop()
        super().crop(*args, **kwargs)

    def prefetch(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Bring back the next layer, from `layer_idx` on, that offloading took away."""
        count = len(self.layers)
        order = [(layer_idx + step) % count for step in range(count)]
        there = [index for index in order if not isinstance(self.layers[index], NHACacheLayer)]
        if there:
            super().prefetch(there[0], only_non_sliding)

    def offload(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Take one full-attention layer's keys and values away; NHA states stay."""
        if not isinstance(self.layers[layer_idx], NHACacheLayer):
            super().offload(layer_idx, only_non_sliding)


def check_cache(cache: Cache, nha_layers: Iterable[int]) -> None:
    """Refuse a cache that an NHA model cannot use.

    Raises:
        ValueError: the cache has no NHA state for one of `nha_layers`.
    """
    layers = getattr(cache, "layers", [])
    for index in nha_layers:
        if index >= len(layers) or not getattr(layers[index], "is_nha", False):
            raise ValueError(
                f"layer {index} is an NHA layer, but the given {type(cache).__name__} has no NHA state for it: "
                "pass model.new_cache(), a cache that this model returned, or none"
            )
