"""The teacher's attention beyond a window: how much each query gives there, and what it is given to.

Legend: B rows, T time, H query heads, G key/value heads (R = H / G), D head_dim, C queries at a time, E keys up to the
last of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .families import FAMILIES

SCORES_AT_ONCE = 2**24
"""Attention scores (B * H * C * T) that are held at a time: 64 MB in fp32."""


def own_windows(config: Any) -> list[int | None]:
    """The teacher's own sliding window in each layer of an NHA configuration; None where it sees everything."""
    return FAMILIES[config.model_type.removeprefix("nha_")].sliding_windows(config.to_dict())


def attention_shares(
    query: Tensor,
    key: Tensor,
    scale: float,
    *,
    own: int | None = None,
    documents: Tensor | None = None,
    at_once: int = SCORES_AT_ONCE,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Causal softmax attention, some queries at a time.

    Args:
        query: [B, T, H, D], rotated; key: [B, T, G, D], rotated.
        scale: of the scores.
        own: the layer's own sliding window, or None.
        documents: int64 [B, T], the number of each token's document; None: each row is one.
        at_once: scores held at a time.
    Yields:
        age [C, E], int64: how many tokens each key stands before each query; and shares [B, G, R, C, E] in fp32.
    """
    rows, length, heads, _ = query.shape
    groups = key.shape[2]
    key = key.transpose(1, 2)[:, :, None]  # [B,G,1,T,D]
    query = query.unflatten(2, (groups, heads // groups)).permute(0, 2, 3, 1, 4)  # [B,G,R,T,D]
    step = max(1, at_once // (rows * heads * length))
    places = torch.arange(length, device=query.device)
    for start in range(0, length, step):
        end = min(start + step, length)
        age = places[start:end, None] - places[:end]  # [C,E]
        hidden = (age < 0) if own is None else (age < 0) | (age >= own)
        if documents is not None:
            hidden = hidden | (documents[:, start:end, None] != documents[:, None, :end])[:, None, None]  # [B,1,1,C,E]
        scores = (query[:, :, :, start:end] @ key[:, :, :, :end].transpose(-1, -2)).float() * scale
        yield age, scores.masked_fill_(hidden, float("-inf")).softmax(-1)


def beyond(age: Tensor, window: int, sinks: int, places: Tensor | None = None) -> Tensor:
    """Keys that a query sees neither in its window nor as a sink.

    Args:
        age: [C, E] as `attention_shares` gives it.
        places: [B, T] of each token in its document; None: in its row.
    Returns:
        bool [C, E], or [B, 1, 1, C, E] with `places`.
    """
    keys = age.shape[1]
    if places is None:
        return (age >= window) & (torch.arange(keys, device=age.device) >= sinks)
    return (age >= window) & (places[:, None, None, None, :keys] >= sinks)


def far_share(
    query: Tensor,
    key: Tensor,
    scale: float,
    window: int,
    sinks: int,
    *,
    own: int | None = None,
    documents: Tensor | None = None,
) -> Tensor:
    """How much of each query's attention lies beyond the window, mean over heads.

    Args:
        As `attention_shares` and `beyond`.
    Returns:
        fp32 [B, T], between 0 and 1.
    """
    places = None if documents is None else _places(documents)
    parts = [
        (shares * beyond(age, window, sinks, places)).sum(-1).mean((1, 2))
        for age, shares in attention_shares(query, key, scale, own=own, documents=documents)
    ]
    return torch.cat(parts, 1)


def _places(documents: Tensor) -> Tensor:
    """[B, T] place of each token in its document, from 0; documents stand end to end."""
    at = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    first = torch.ones_like(documents, dtype=torch.bool)
    first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return at - at.masked_fill(~first, 0).cummax(1).values


def received_attention(
    query: Tensor,
    key: Tensor,
    scale: float,
    window: int,
    sinks: int,
    *,
    own: int | None = None,
    power: float = 1.0,
) -> Tensor:
    """How much attention each token is given after it has left the window, by all queries and heads of its key's head.

    Args:
        As `attention_shares` and `beyond`.
        power: of every share before it is added up: above 1, few strong looks count more than many weak ones.
    Returns:
        fp32 [B, T, G], at least 0.
    """
    total = torch.zeros(key.shape[:3], device=key.device)
    for age, shares in attention_shares(query, key, scale, own=own):
        given = (shares.pow(power) * beyond(age, window, sinks)).sum((2, 3))  # [B,G,E]
        total[:, : age.shape[1]] += given.transpose(1, 2)
    return total


def attention_by_distance(
    query: Tensor, key: Tensor, scale: float, window: int, sinks: int, *, own: int | None = None
) -> Tensor:
    """What each head gives to tokens beyond the window, by how far they stand before the query.

    Args:
        As `attention_shares` and `beyond`.
    Returns:
        fp32 [H, T], summed over rows and queries; 0 below `window`.
    """
    length, heads = query.shape[1:3]
    total = torch.zeros(heads, length, device=query.device)
    for age, shares in attention_shares(query, key, scale, own=own):
        far = (shares * beyond(age, window, sinks)).sum(0).flatten(0, 1).flatten(1)  # [H,C*E]
        total.index_add_(1, age.clamp_min(0).flatten(), far)
    return total
