"""Attention beyond a window: sums agree with a plain softmax, in any pieces, packed documents and heads apart."""

import pytest
import torch

from nha_convert.far_attention import (
    attention_by_distance,
    attention_shares,
    beyond,
    far_share,
    received_attention,
)

WINDOW, SINKS, SCALE = 4, 2, 0.5


def drawn(rows: int = 2, length: int = 19, heads: int = 4, groups: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(rows, length, heads, 6, generator=generator),
        torch.randn(rows, length, groups, 6, generator=generator),
    )


def plain(query: torch.Tensor, key: torch.Tensor, own: int | None = None) -> torch.Tensor:
    """[B, H, T, T] causal softmax, in fp64."""
    key = key.double().repeat_interleave(query.shape[2] // key.shape[2], dim=2)
    scores = torch.einsum("bihd,bjhd->bhij", query.double(), key) * SCALE
    places = torch.arange(query.shape[1])
    age = places[:, None] - places
    hidden = (age < 0) | (age >= (own or len(places)))
    return scores.masked_fill(hidden, float("-inf")).softmax(-1)


def far_mask(length: int) -> torch.Tensor:
    places = torch.arange(length)
    return (places[:, None] - places >= WINDOW) & (places >= SINKS)


@pytest.mark.parametrize("at_once", [1, 300, 10**6])
@pytest.mark.parametrize("own", [None, 7])
def test_shares_are_the_softmax_in_any_pieces(at_once: int, own: int | None) -> None:
    query, key = drawn()
    wanted = plain(query, key, own)
    start = 0
    for age, shares in attention_shares(query, key, SCALE, own=own, at_once=at_once):
        end = start + len(age)
        torch.testing.assert_close(shares.flatten(1, 2).double(), wanted[:, :, start:end, :end], rtol=1e-5, atol=1e-6)
        assert age[0, 0] == start and age[-1, -1] == 0
        start = end
    assert start == query.shape[1]


def test_sums_over_queries_keys_and_distances() -> None:
    query, key = drawn()
    far = plain(query, key) * far_mask(query.shape[1])  # [B,H,T,T]
    where = (SCALE, WINDOW, SINKS)
    torch.testing.assert_close(far_share(query, key, *where).double(), far.sum(-1).mean(1), rtol=1e-5, atol=1e-6)
    for power in (1.0, 1.5):
        wanted = far.pow(power).sum(2).unflatten(1, (2, 2)).sum(2).transpose(1, 2)  # [B,T,G]
        found = received_attention(query, key, *where, power=power)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
        assert not found[:, :SINKS].any(), "sinks never leave the window"
    found = attention_by_distance(query, key, *where)
    for distance in range(query.shape[1]):
        wanted = far.diagonal(-distance, dim1=-2, dim2=-1).sum((0, 2))
        torch.testing.assert_close(found[:, distance].double(), wanted, rtol=1e-5, atol=1e-6)
    assert not found[:, :WINDOW].any()


def test_documents_of_a_row_do_not_see_one_another() -> None:
    query, key = drawn(rows=1)
    documents = torch.tensor([[0] * 8 + [1] * 11])
    found = far_share(query, key, SCALE, WINDOW, SINKS, documents=documents)
    parts = [far_share(query[:, s], key[:, s], SCALE, WINDOW, SINKS) for s in (slice(0, 8), slice(8, None))]
    torch.testing.assert_close(found, torch.cat(parts, 1))
    assert found[0, 8 : 8 + WINDOW].tolist() == [0] * WINDOW


def test_nothing_lies_beyond_a_window_of_everything() -> None:
    age, _ = next(attention_shares(*drawn(), SCALE))
    assert not beyond(age, 19, 0).any() and beyond(age, 0, 0).sum() == (age >= 0).sum()
