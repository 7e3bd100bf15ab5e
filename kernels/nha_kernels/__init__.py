"""Native hybrid attention: one softmax over gated memory slots, attention sinks and an exact sliding window."""

from .gates import log_decay_from_logits, write_strength
from .ops import nha_attention, nha_decode
from .state import NHAState

__all__ = ["NHAState", "log_decay_from_logits", "nha_attention", "nha_decode", "write_strength"]
