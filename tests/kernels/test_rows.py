"""Padding, packed documents, states: a row gives what it gives alone, however it is cut up."""

import pytest
import torch
from nha_kernels import NHAState, log_decay_from_logits, nha_decode
from op_cases import EXACT, FLOAT, TOLERANCE, assert_close, attend, case, cut, run

OPTIONS = {"window": 7, "sinks": 2}


def masks() -> dict[str, torch.Tensor]:
    """Padding [3,40] of several kinds."""
    place = torch.arange(40)
    lengths = torch.tensor([40, 23, 5])[:, None]
    holes = torch.rand(3, 40, generator=torch.Generator().manual_seed(0)) < 0.6
    mixed = torch.stack([place < 30, place >= 17, (place > 4) & (place < 21)])
    empty_row = torch.stack([place < 0, place < 12, place >= 0])
    return {
        "left": place >= 40 - lengths,
        "right": place < lengths,
        "mixed": mixed,
        "holes": holes,
        "empty row": empty_row,
    }


@pytest.mark.parametrize("kind", list(masks()))
def test_padding_takes_no_place(kind):
    mask = masks()[kind]
    x = case(40, batch=3)
    got = run(x, EXACT, 8.0, backend="torch", padding_mask=mask, **OPTIONS)
    assert_close(got, run(x, EXACT, 8.0, backend="reference", padding_mask=mask, **OPTIONS), TOLERANCE[EXACT])
    assert not got["o"][~mask].any()
    for name in ("q", "k", "v", "logits"):
        assert not got[f"d{name}"][~mask].any()
    for b in range(3):
        if mask[b].any():
            row = {n: y if n.startswith("slot") else y[b : b + 1, mask[b]] for n, y in x.items()}
            alone, _ = attend(row, **OPTIONS)
            torch.testing.assert_close(got["o"][b : b + 1, mask[b]], alone, rtol=0, atol=1e-12)


def test_padding_contents_do_not_matter():
    mask = masks()["holes"]
    x = case(40, batch=3)
    o, _ = attend(x, padding_mask=mask, **OPTIONS)
    for name in ("q", "k", "v", "logits", "cos", "sin"):
        x[name][~mask] = 1e4
    again, _ = attend(x, padding_mask=mask, **OPTIONS)
    assert torch.equal(o, again)


@pytest.mark.parametrize("lengths", [[40], [1, 20, 0, 80, 3, 9], [130, 5]])
def test_packed_documents_do_not_see_each_other(lengths):
    ends = torch.tensor([0, *lengths]).cumsum(0)
    x = case(int(ends[-1]), batch=1)
    got = run(x, EXACT, 8.0, backend="torch", cu_seqlens=ends.int(), **OPTIONS)
    assert_close(got, run(x, EXACT, 8.0, backend="reference", cu_seqlens=ends, **OPTIONS), TOLERANCE[EXACT])
    for i, (a, b) in enumerate(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)):
        if a < b:
            alone, state = attend(cut(x, slice(a, b)), output_final_state=True, **OPTIONS)
            torch.testing.assert_close(got["o"][:, a:b], alone, rtol=0, atol=1e-12)
            torch.testing.assert_close(got["final slot_k"][i], state.slot_k[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [EXACT, FLOAT])
@pytest.mark.parametrize("window,sinks,done", [(7, 2, 1), (7, 2, 25), (0, 0, 5), (0, 3, 2), (30, 0, 12), (16, 1, 33)])
def test_continuation_equals_recurrence(window, sinks, done, dtype):
    """Initial state: forward, and gradients of everything it holds."""
    options = {"window": window, "sinks": sinks}
    x = case(done + 37, dtype=dtype)
    _, state = attend(cut(x, slice(0, done)), backend="reference", output_final_state=True, **options)
    state = state.with_tensors(
        {n: y.to(dtype).to(EXACT) if y.is_floating_point() else y for n, y in state.tensors().items()}
    )
    rest = cut(x, slice(done, None))
    want = run(rest, EXACT, 8.0, state, backend="reference", **options)
    assert_close(run(rest, dtype, 8.0, state, backend="torch", **options), want, TOLERANCE[dtype])


@pytest.mark.parametrize("cuts", [[11], [3, 4, 30], [1, 2, 3, 47]])
@pytest.mark.parametrize("window,sinks", [(7, 2), (0, 0), (0, 3), (24, 1), (100, 0)])
def test_any_split_gives_one_pass(window, sinks, cuts):
    """Chunks of any length, the last eight tokens one by one."""
    options = {"window": window, "sinks": sinks}
    x = case(60)
    want, want_state = attend(x, output_final_state=True, **options)
    state, parts, ends = None, [], [0, *cuts, 52]
    for a, b in zip(ends[:-1], ends[1:], strict=True):
        o, state = attend(cut(x, slice(a, b)), initial_state=state, output_final_state=True, **options)
        parts.append(o)
    for t in range(52, 60):
        parts.append(decode(cut(x, slice(t, t + 1)), state))
    torch.testing.assert_close(torch.cat(parts, 1), want, rtol=0, atol=1e-12)
    torch.testing.assert_close(state.slot_v, want_state.slot_v, rtol=0, atol=1e-12)
    assert torch.equal(state.seen, want_state.seen)


def decode(x: dict[str, torch.Tensor], state: NHAState, **options) -> torch.Tensor:
    inputs = dict(x)
    log_decay = log_decay_from_logits(inputs.pop("logits"), 8.0)
    return nha_decode(inputs.pop("q"), inputs.pop("k"), inputs.pop("v"), log_decay, state, **inputs, **options)


@pytest.mark.parametrize("branch", ["both", "window", "slots"])
@pytest.mark.parametrize("mask_empty", [True, False])
def test_decode_from_nothing(branch, mask_empty):
    """fp32, four windows past the window, against the fp64 recurrence."""
    x = case(35, dtype=FLOAT)
    options = {"mask_empty": mask_empty, "branch": branch}
    want, _ = attend(x, backend="reference", **OPTIONS, **options)
    x = {n: y.float() for n, y in x.items()}
    state = NHAState.new(2, 2, 8, 16, rotary_dim=16, **OPTIONS)
    got = torch.cat([decode(cut(x, slice(t, t + 1)), state, **options) for t in range(35)], 1)
    assert (got.double() - want).abs().max() <= 1e-5 * want.abs().max()


def test_rows_at_different_positions():
    """Left-padded prefill in two chunks, then decoding in which one row pauses."""
    mask = torch.ones(3, 40, dtype=torch.bool)
    mask[0, :13] = False
    mask[1, :30] = False
    mask[2, 20:24] = False
    mask[2, 36] = False
    x = case(40, batch=3)
    want, want_state = attend(x, padding_mask=mask, output_final_state=True, backend="reference", **OPTIONS)
    state, parts = None, []
    for a, b in ((0, 16), (16, 32)):
        o, state = attend(
            cut(x, slice(a, b)), padding_mask=mask[:, a:b], initial_state=state, output_final_state=True, **OPTIONS
        )
        parts.append(o)
    for t in range(32, 40):
        parts.append(decode(cut(x, slice(t, t + 1)), state, padding_mask=mask[:, t : t + 1]))
    torch.testing.assert_close(torch.cat(parts, 1), want, rtol=0, atol=1e-12)
    torch.testing.assert_close(state.slot_k, want_state.slot_k, rtol=0, atol=1e-12)
    assert state.seen.tolist() == mask.sum(1).tolist()


def test_state_rows_move():
    x = case(30, batch=3)
    first, last = cut(x, slice(0, 29)), cut(x, slice(29, 30))
    _, state = attend(first, output_final_state=True, **OPTIONS)
    kept = state.clone()
    want, _ = attend(last, initial_state=state, **OPTIONS)
    assert all(torch.equal(a, b) for a, b in zip(state.tensors().values(), kept.tensors().values(), strict=True))

    order = torch.tensor([2, 0, 0])
    moved = {n: y if n.startswith("slot") else y[order] for n, y in last.items()}
    assert torch.allclose(decode(moved, state.select(order)), want[order], rtol=0, atol=1e-12)
    assert torch.allclose(decode(moved, state.clone().reorder(order)), want[order], rtol=0, atol=1e-12)
    twice = {n: y if n.startswith("slot") else y.repeat_interleave(2, 0) for n, y in last.items()}
    assert torch.allclose(decode(twice, state.repeat(2)), want.repeat_interleave(2, 0), rtol=0, atol=1e-12)
    both = NHAState.cat([state.select(torch.tensor([0])), state.select(torch.tensor([1, 2]))])
    assert torch.allclose(decode(last, both), want, rtol=0, atol=1e-12)
    assert torch.equal(state.slot_k, kept.slot_k)
    decode(last, state)
    assert not torch.equal(state.slot_k, kept.slot_k)


def test_decode_reference_backend_agrees():
    x = case(12)
    _, state = attend(cut(x, slice(0, 11)), output_final_state=True, **OPTIONS)
    other, last = state.clone(), cut(x, slice(11, 12))
    torch.testing.assert_close(decode(last, state), decode(last, other, backend="reference"), rtol=0, atol=1e-12)
    torch.testing.assert_close(state.slot_k, other.slot_k, rtol=0, atol=1e-12)
    assert torch.equal(state.seen, other.seen)


def test_decode_takes_one_token():
    x = case(3)
    with pytest.raises(ValueError, match="one token.*use nha_attention"):
        decode(x, NHAState.new(2, 2, 8, 16, rotary_dim=16, **OPTIONS))
