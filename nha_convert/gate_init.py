"""How the gates of an NHA layer start: a pure function of its W_k, for models in memory and for streamed ones.

`clusters`, `calibrated` and `attended` start as `horizons` here; `gate_inputs.calibrate_gates` makes them what they
are, on text.

Shapes: G key/value heads, D head_dim, M slots.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn

from .errors import InputError
from .modeling.attention_nha import nha_layers
from .settings import NHASettings
from .settings_types import NEEDS_TEXT

METHODS = ("key", "spread", "zero", "horizons", "clusters", "calibrated", "attended")
Horizons = tuple[float, float]
"""Shortest and longest horizon, in tokens."""
SHORTEST_HORIZON, LONGEST_HORIZON = 8.0, 2000.0  # tokens
SPREAD_SCALE = 0.3
REPEAT_NOISE = 0.1  # of the weight's own standard deviation


def gate_parameters(
    key_weight: torch.Tensor,
    method: str,
    *,
    groups: int,
    slots: int,
    tau: float,
    seed: int,
    horizons: Horizons = (SHORTEST_HORIZON, LONGEST_HORIZON),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Starting weight and bias of one layer's `gate_proj`.

    `key` takes the rows of W_k, so that a slot listens to what the keys encode, with bias 0. With M < D it takes
    evenly strided rows; with M > D it repeats them, the repeats with a little seeded noise, so that no two slots are
    the same. `spread` scales that by 0.3 and gives each head's slots biases whose horizons 1 / (1 - a) are
    log-spaced from 8 to 2000 tokens. `horizons` does so with ends of its own; where those that
    need text begin.
    `zero` is all zero.

    Args:
        key_weight: [G * D, hidden], `k_proj.weight`.
        tau: the configuration's `nha_tau`.
        seed: seeds the noise of repeated rows; read only when M > D.
        horizons: the ends of all methods but `key`, `spread` and `zero`.
    Returns:
        weight [G * M, hidden] and bias [G * M], fp32 on the CPU.
    Raises:
        ValueError: unknown method, or a weight whose rows do not divide into the groups.
    """
    if method not in METHODS:
        raise ValueError(f"gate_init is {method!r}: it must be one of {', '.join(METHODS)}")
    rows, hidden = key_weight.shape
    if rows % groups:
        raise ValueError(f"k_proj.weight has {rows} rows, which do not divide into {groups} key/value heads")
    if method == "zero":
        return torch.zeros(groups * slots, hidden), torch.zeros(groups * slots)
    weight = _key_rows(
        key_weight.detach().to("cpu", torch.float32).view(groups, -1, hidden), slots, seed
    )  # [G,M,hidden]
    if method == "key":
        return weight.flatten(0, 1), torch.zeros(groups * slots)
    ends = (SHORTEST_HORIZON, LONGEST_HORIZON) if method == "spread" else horizons
    return SPREAD_SCALE * weight.flatten(0, 1), horizon_biases(slots, tau, ends).repeat(groups)


def _key_rows(key: torch.Tensor, slots: int, seed: int) -> torch.Tensor:
    """[G, D, hidden] -> [G, M, hidden]: strided for M < D, repeated with noise for M > D."""
    head_dim = key.shape[1]
    if slots <= head_dim:
        return key[:, torch.arange(slots) * head_dim // slots]
    rows = key[:, torch.arange(slots) % head_dim]
    generator = torch.Generator().manual_seed(seed)
    noise = REPEAT_NOISE * key.std() * torch.randn(rows[:, head_dim:].shape, generator=generator)
    return torch.cat((rows[:, :head_dim], rows[:, head_dim:] + noise), dim=1)


def horizon_biases(
    slots: int, tau: float, ends: Horizons = (SHORTEST_HORIZON, LONGEST_HORIZON)
) -> torch.Tensor:
    """[M] gate biases whose horizons 1 / (1 - a), a = sigmoid(bias) ** (1 / tau), are log-spaced, shortest first."""
    return logit_of_horizon(spread_horizons(slots, ends), tau).float()


def spread_horizons(slots: int, ends: Horizons) -> torch.Tensor:
    """[M] horizons in tokens, log-spaced between both ends, shortest first; one slot stands in their middle (fp64)."""
    low, high = math.log(ends[0]), math.log(ends[1])
    if slots == 1:
        return torch.tensor([math.exp((low + high) / 2)], dtype=torch.float64)
    return torch.linspace(low, high, slots, dtype=torch.float64).exp()


def logit_of_horizon(horizons: torch.Tensor, tau: float) -> torch.Tensor:
    """Gate logits, in fp64, at which a slot looks back over so many tokens (each more than 1)."""
    log_sigmoid = tau * torch.log1p(-1 / horizons.double())
    return log_sigmoid - torch.log(-torch.expm1(log_sigmoid))


def layer_horizons(window: int | None, ends: Sequence[float] | None, length: int | None) -> Horizons:
    """The horizons of one layer.

    Args:
        window: of the layer; None where it starts as full attention.
        ends: `nha.gate_horizons`, which goes before all else.
        length: tokens of a training row; None where there is no training, as in `swap`: 2000.
    Returns:
        the window (at least 2 tokens; 8 for a full layer) and `length`, or twice the first if that is longer.
    """
    if ends is not None:
        return float(ends[0]), float(ends[1])
    shortest = SHORTEST_HORIZON if window is None else max(2.0, float(window))
    return shortest, max(2 * shortest, LONGEST_HORIZON if length is None else float(length))


def refuse_text(nha: NHASettings, where: str) -> None:
    """
    Raises:
        InputError: the gates start from text, and `where` the model does not run.
    """
    method = nha.gate_init
    if method in NEEDS_TEXT:
        free = ", ".join(name for name in METHODS if name not in NEEDS_TEXT)
        if nha.gate == "routed":
            raise InputError(
                f"nha.gate is routed: such gates start from what the layers see on text; {where}. Set it to "
                f"independent, with nha.gate_init one of {free}"
            )
        raise InputError(
            f"nha.gate_init is {method}, which starts gates from what the layers see on text; {where}. Set it to one "
            f"of {free}"
        )


def layer_seed(seed: int, layer: int) -> int:
    """The seed of one layer's noise: different layers differ, and in-memory and streamed conversion agree."""
    return seed * 100_003 + layer


@torch.no_grad()
def init_gates(
    model: nn.Module,
    method: str,
    *,
    seed: int,
    ends: Sequence[float] | None = None,
    length: int | None = None,
) -> None:
    """Set every NHA layer's gate from its W_k by `method`, its slot-query scale to 1 and its slot bias to 0.

    Args:
        ends, length: of the horizons, as in `layer_horizons`.
    Raises:
        ValueError: unknown method.
    """
    for index, attention in nha_layers(model):
        gate = attention.nha
        weight, bias = gate_parameters(
            attention.k_proj.weight,
            method,
            groups=gate.groups,
            slots=gate.slots,
            tau=gate.tau,
            seed=layer_seed(seed, index),
            horizons=layer_horizons(attention.nha_window, ends, length),
        )
        gate.gate_proj.weight.copy_(weight)
        gate.gate_proj.bias.copy_(bias)
        if gate.write_proj is not None:  # until `calibrate_gates`: every token is written with strength 1/2
            gate.write_proj.weight.zero_()
            gate.write_proj.bias.zero_()
        if gate.slot_q_scale is not None:
            gate.slot_q_scale.fill_(1.0)
        if gate.slot_bias is not None:
            gate.slot_bias.fill_(0.0)
