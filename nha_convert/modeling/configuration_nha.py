"""Configurations: the base family's own, plus what the NHA layers need.

Each class keeps every field of its base class, so a teacher's `config.json` plus the fields below is a student's.
The classes `NHA<Family>Config` are made from the table of families.
"""

from dataclasses import dataclass
from typing import Any

import transformers

from nha_convert.families import FAMILIES, Family

FULL = "full"
GATES = ("independent", "routed")


@dataclass(kw_only=True)
class NHAFields:
    """Fields shared by every NHA configuration.

    Args:
        nha_windows: one entry per layer: the exact tokens each query sees (itself included; 0 is a pure linear RNN),
            "full" for an NHA layer that at present runs the base model's own attention (`set_windows`), or None for
            a layer that was never converted. None for the whole list: no layer was.
        nha_slots: M, memory slots per key/value head; one number, or one for each layer.
        nha_sinks: S, first tokens of a document that stay exact keys for ever.
        nha_gate: "independent": every slot has a decay of its own, as in the paper; "routed": a token is written once,
            with a strength of its own, shared out among the slots by a softmax.
        nha_tau: the slot decay of independent gates is `sigmoid(logit) ** (1 / nha_tau)`.
        nha_slot_query_scale: learn a scale per query channel for the slots' scores.
        nha_slot_bias: learn a bias per head for the slots' scores.
        nha_slot_rotary: the slots take rotated keys and are met by rotated queries, as the window's are.
        nha_mask_empty: mask the slots until they have absorbed something.
    Raises:
        ValueError: a field is out of range, or `nha_windows` does not have one entry per layer.
    """

    nha_windows: list[int | str | None] | None = None
    nha_slots: int | list[int] = 64
    nha_sinks: int = 4
    nha_gate: str = "independent"
    nha_tau: float = 8.0
    nha_slot_query_scale: bool = True
    nha_slot_bias: bool = True
    nha_slot_rotary: bool = False
    nha_mask_empty: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]
        layers: int = self.num_hidden_layers  # type: ignore[attr-defined]
        if self.nha_windows is None:
            self.nha_windows = [None] * layers
        if len(self.nha_windows) != layers:
            raise ValueError(
                f"nha_windows has {len(self.nha_windows)} entries but num_hidden_layers is {layers}: "
                "give one window per layer, None for full attention"
            )
        for index, window in enumerate(self.nha_windows):
            if window is not None and not is_window(window):
                raise ValueError(f"nha_windows[{index}] is {window!r}: it must be None, 'full' or an integer >= 0")
        if isinstance(self.nha_slots, list) and len(self.nha_slots) != layers:
            raise ValueError(
                f"nha_slots has {len(self.nha_slots)} entries but num_hidden_layers is {layers}: "
                "give one number, or one per layer"
            )
        if min(self.slots_of(layer) for layer in range(layers)) < 1:
            raise ValueError(f"nha_slots is {self.nha_slots}: it must be at least 1")
        if self.nha_sinks < 0:
            raise ValueError(f"nha_sinks is {self.nha_sinks}: it must be 0 or more")
        if self.nha_gate not in GATES:
            raise ValueError(f"nha_gate is {self.nha_gate!r}: it must be one of {', '.join(GATES)}")
        if not self.nha_tau > 0:
            raise ValueError(f"nha_tau is {self.nha_tau}: it must be positive")

    def slots_of(self, layer: int) -> int:
        """Memory slots per key/value head of one layer."""
        return self.nha_slots[layer] if isinstance(self.nha_slots, list) else self.nha_slots


def is_window(value: Any) -> bool:
    """Whether `value` is a window of an NHA layer: "full" or an integer >= 0."""
    return value == FULL or (isinstance(value, int) and not isinstance(value, bool) and value >= 0)


def _config_class(family: Family) -> Any:
    fields = {
        "model_type": family.nha_model_type,
        "__module__": __name__,
        "__doc__": f"{family.models} with NHA layers; see `NHAFields`.",
    }
    return type(f"NHA{family.prefix}Config", (NHAFields, getattr(transformers, f"{family.prefix}Config")), fields)


CONFIGS = {family.model_type: _config_class(family) for family in FAMILIES.values()}
"""Configuration class by the base family's `model_type`; each is also an attribute of this module."""
globals().update({config.__name__: config for config in CONFIGS.values()})
