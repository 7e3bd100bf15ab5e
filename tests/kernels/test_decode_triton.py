"""One decode step in Triton, in the interpreter, against the fp64 recurrence and against the torch step.

Every buffer that the kernels fill is NaN before.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("these tests run in Triton's interpreter", allow_module_level=True)
pytest.importorskip("triton")

import torch
from nha_kernels import (
    NHAState,
    decode_triton,
    log_decay_from_logits,
    nha_attention,
    nha_decode,
)
from nha_kernels.decode_torch import decode_step
from nha_kernels.decode_triton import choose_splits, decode_step_triton
from op_cases import EXACT, FLOAT, assert_close, case, cut, differences
from triton.runtime.interpreter import interpreter_builder

STEP = 2e-6  # fp32 against fp64, relative to the largest entry; measured 7e-7
DEFAULTS: dict[str, Any] = {"scale": None, "mask_empty": True, "padding_mask": None, "branch": "both"}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty and torch.empty_like give NaN."""

    def poison(make: Any) -> Any:
        def made(*args: Any, **options: Any) -> torch.Tensor:
            x = make(*args, **options)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return made

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))


def to(x: Any, dtype: torch.dtype) -> Any:
    """Tensors by name, or a state, in another dtype; a state keeps fp32 where it is always fp32."""
    if isinstance(x, NHAState):
        kept = {n: y for n, y in x.tensors().items() if n[-2:] in ("_k", "_v") and not n.startswith("slot")}
        rest = {n: y.to(EXACT if dtype == EXACT else FLOAT) for n, y in x.tensors().items() if n not in kept}
        rest["seen"] = x.seen.clone()
        return x.with_tensors({n: y.to(dtype) for n, y in kept.items()} | rest)
    return {n: y.to(dtype) for n, y in x.items()}


def step(run: Any, x: dict[str, torch.Tensor], state: NHAState, **options: Any) -> torch.Tensor:
    """One step of `run` on one token."""
    options = {"cos": None, "sin": None, "slot_q_scale": None, "slot_bias": None} | DEFAULTS | x | options
    log_decay = log_decay_from_logits(options.pop("logits"), 8.0)
    return run(options.pop("q"), options.pop("k"), options.pop("v"), log_decay, state, **options)


def reference(*args: Any, **options: Any) -> torch.Tensor:
    return nha_decode(*args, backend="reference", **options)


def begin(
    x: dict[str, torch.Tensor], window: int, sinks: int, mask: torch.Tensor | None, dtype: torch.dtype
) -> NHAState:
    """The fp64 state after the tokens of x, exactly representable with keys of `dtype`."""
    inputs = dict(x)
    log_decay = log_decay_from_logits(inputs.pop("logits"), 8.0)
    _, state = nha_attention(
        inputs.pop("q"), inputs.pop("k"), inputs.pop("v"), log_decay, window=window, sinks=sinks, padding_mask=mask,
        output_final_state=True, **inputs,
    )  # fmt: skip
    return to(to(state, dtype), EXACT)


def wrong_steps(
    x: dict[str, torch.Tensor],
    done: int,
    window: int,
    sinks: int = 0,
    splits: tuple[int, ...] = (1,),
    mask: torch.Tensor | None = None,
    **options: Any,
) -> dict[str, str]:
    """Steps over the tokens from `done` on that are not what they must be: {token, splits and tensor: by how much}.

    Every output and the slots against the reference, the whole state against the torch step in fp64 (a ring place that
    the reference has forgotten keeps its old token); any number of splits against each other, to the bit.
    """
    start = begin(cut(x, slice(0, done)), window, sinks, None if mask is None else mask[:, :done], FLOAT)
    want_state, torchs = start.clone(), start.clone()
    states = {n: to(start.clone(), FLOAT) for n in splits}
    found: dict[str, str] = {}
    for t in range(done, x["q"].shape[1]):
        token = cut(x, slice(t, t + 1))
        if mask is not None:
            options["padding_mask"] = mask[:, t : t + 1]
        want = {"o": step(reference, token, want_state, **options)}
        step(decode_step, token, torchs, **options)
        want |= torchs.tensors() | {n: y for n, y in want_state.tensors().items() if n.startswith("slot")}
        for n, state in states.items():
            o = step(decode_step_triton, to(token, FLOAT), state, splits=n, **options)
            assert o.dtype == FLOAT and o.shape == token["q"].shape
            got = {"o": o} | state.tensors()
            off = differences(got, want, STEP)
            if not torch.equal(state.seen, want_state.seen):
                off["seen"] = f"{state.seen} for {want_state.seen}"
            if mask is not None and o[~mask[:, t]].any():
                off["o of padding"] = "not zero"
            found |= {f"token {t}, {n} splits, {name}": said for name, said in off.items()}
    first, *others = states.values()
    for other in others:
        for name, y in first.tensors().items():
            if not torch.equal(y, other.tensors()[name]):
                found[f"{name} of other splits"] = "another"
    return found


@pytest.mark.parametrize("kind", ["normal", "mixed"])
def test_from_nothing(kind: str) -> None:
    """Sinks fill, then the window, then the slots, past two turns of the ring."""
    x = case(13, kind=kind, dtype=FLOAT)
    assert not wrong_steps(x, 1, 4, sinks=2, splits=(1, 3))


@pytest.mark.parametrize("branch", ["both", "window", "slots"])
@pytest.mark.parametrize("mask_empty", [True, False])
@pytest.mark.parametrize("window,sinks", [(0, 0), (0, 3), (4, 1)])
def test_branches(branch: str, mask_empty: bool, window: int, sinks: int) -> None:
    x = case(9, dtype=FLOAT)
    assert not wrong_steps(x, 1, window, sinks, branch=branch, mask_empty=mask_empty)


@pytest.mark.parametrize("splits", [1, 4])
def test_rows_at_different_positions(splits: int) -> None:
    """One row begins with nothing, one pauses early, one past its window; the mask is a strided slice."""
    mask = torch.ones(3, 26, dtype=torch.bool)
    mask[0, :20] = False
    mask[1, 3:20] = False
    mask[1, 22:24] = False
    mask[2, 23] = False
    assert not wrong_steps(case(26, batch=3, dtype=FLOAT), 20, 7, 2, (splits,), mask)


@pytest.mark.parametrize(
    "shape",
    [
        {"dim": 96, "rotary": 96, "repeat": 1},
        {"dim": 96, "rotary": 24, "slots": 24},
        {"dim": 32, "rotary": 8, "slots": 80, "repeat": 7},
        {"dim": 16, "rotary": 0, "slots": 8, "repeat": 16, "groups": 1},
        {"dim": 256, "rotary": 64, "slots": 16, "batch": 1},
        {"dim": 64, "rotary": 64, "slots": 256, "groups": 1},
    ],
    ids=str,
)
def test_shapes(shape: dict[str, int]) -> None:
    """Head sizes, partial rotation, slot counts and head groups; windows of several key blocks."""
    assert not wrong_steps(case(74, **{"rotary": 16} | shape, dtype=FLOAT), 72, 70, 1, (1, 3))


@pytest.mark.parametrize("window,sinks", [(40, 20), (6, 2)])
def test_without_learnables(window: int, sinks: int) -> None:
    """No slot scale and bias, a scale of its own, cos and sin shared by the rows, more sinks than one block."""
    x = {n: y for n, y in case(66, dtype=FLOAT).items() if not n.startswith("slot")}
    for name in ("cos", "sin"):
        x[name] = x[name][:1]
    assert not wrong_steps(x, 63, window, sinks, (1, 2), scale=0.4)


def test_kept_in_another_dtype() -> None:
    """fp32 inputs and an fp16 ring: the incoming token counts as the ring keeps it."""
    x = case(12, dtype=FLOAT)
    for window in (0, 4):
        start = begin(cut(x, slice(0, 8)), window, 1, None, torch.float16)
        ours, torchs = to(start.clone(), torch.float16), to(start.clone(), torch.float16)
        for t in range(8, 12):
            token = to(cut(x, slice(t, t + 1)), FLOAT)
            got = {"o": step(decode_step_triton, token, ours, splits=2)} | ours.tensors()
            assert_close(got, {"o": step(decode_step, token, torchs)} | torchs.tensors(), STEP)
            assert ours.ring_k.dtype == torch.float16


def test_decay_below_the_floor() -> None:
    """The ring keeps what came, the slots absorb with the floor."""
    x = case(8, dtype=FLOAT)
    for window in (0, 2):
        start = begin(cut(x, slice(0, 4)), window, 1, None, FLOAT)
        ours, torchs = to(start.clone(), FLOAT), start.clone()
        for t in range(4, 8):
            token = cut(x, slice(t, t + 1))
            token.pop("logits")
            decay = torch.full((2, 1, 2, 8), -9.0 - t / 4, dtype=EXACT)  # the floor is -9.7
            for run, state in ((decode_step_triton, ours), (decode_step, torchs)):
                y = to(token, state.slot_k.dtype)
                run(y.pop("q"), y.pop("k"), y.pop("v"), decay.to(state.slot_k.dtype), state, **DEFAULTS, **y)
            assert_close(ours.tensors(), torchs.tensors(), STEP)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("splits", [1, 3])
def test_sixteen_bits(dtype: torch.dtype, splits: int) -> None:
    """No more than twice the error of the torch step of the same dtype, both against fp64.

    The interpreter truncates where it stores bf16, which alone doubles the error; in fp16 both measure the same.
    """
    x = case(44, dim=32, rotary=32, slots=24, dtype=dtype)
    start = begin(cut(x, slice(0, 40)), 36, 2, None, dtype)
    want_state, ours, torchs = start.clone(), to(start.clone(), dtype), to(start.clone(), dtype)
    errors = {"triton": 0.0, "torch": 0.0}
    for t in range(40, 44):
        token = cut(x, slice(t, t + 1))
        want = step(reference, token, want_state)
        got = step(decode_step_triton, to(token, dtype), ours, splits=splits)
        assert got.dtype == dtype
        for name, o in (("triton", got), ("torch", step(decode_step, to(token, dtype), torchs))):
            errors[name] = max(errors[name], (o.double() - want).abs().max().item())
    print(errors)
    assert errors["triton"] <= 2 * errors["torch"]
    assert_close(ours.tensors(), torchs.tensors(), STEP)


@pytest.mark.parametrize("splits,launches", [(1, 1), (3, 2)])
def test_launches(splits: int, launches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []

    class Counted:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Any:
            counted.append(grid)
            return self.kernel[grid]

    for name in ("decode", "combine"):
        monkeypatch.setattr(decode_triton, name, Counted(getattr(decode_triton, name)))
    x = case(9, dtype=FLOAT)
    state = to(begin(cut(x, slice(0, 8)), 4, 1, None, FLOAT), FLOAT)
    memory = {n: y.data_ptr() for n, y in state.tensors().items()}
    step(decode_step_triton, to(cut(x, slice(8, 9)), FLOAT), state, splits=splits)
    assert len(counted) == launches
    assert {n: y.data_ptr() for n, y in state.tensors().items()} == memory, "the state is updated in place"


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("done", [2, 29])
@pytest.mark.parametrize("splits", [1, 3])
def test_order_of_programs(window: int, done: int, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last program first gives the same bits: none reads what another writes."""
    x = case(done + 1, dtype=FLOAT)
    start = to(begin(cut(x, slice(0, done)), window, 3, None, FLOAT), FLOAT)
    token = to(cut(x, slice(done, None)), FLOAT)
    want_state, state = start.clone(), start.clone()
    want = step(decode_step_triton, token, want_state, splits=splits)
    place = interpreter_builder.set_grid_idx
    backwards = lambda x, y, z: place(interpreter_builder.grid_dim[0] - 1 - x, y, z)  # noqa: E731
    monkeypatch.setattr(interpreter_builder, "set_grid_idx", backwards)
    assert torch.equal(step(decode_step_triton, token, state, splits=splits), want)
    for name, y in state.tensors().items():
        assert torch.equal(y, want_state.tensors()[name]), name


def test_layouts_of_a_model() -> None:
    """q, k and v as slices of one projection, a state that is a view."""
    x = to(case(9, dtype=FLOAT), FLOAT)
    start = to(begin(to(cut(x, slice(0, 8)), EXACT), 4, 1, None, FLOAT), FLOAT)
    token = cut(x, slice(8, 9))
    want_state, state = start.clone(), start.clone()
    want = step(decode_step_triton, token, want_state)
    both = torch.cat([token["k"], token["v"]], -1)
    token |= {"k": both[..., :16], "v": both[..., 16:]}
    for name, y in state.tensors().items():
        setattr(state, name, torch.stack([y, y], -1)[..., 0])
    assert torch.equal(step(decode_step_triton, token, state), want)
    for name, y in state.tensors().items():
        assert torch.equal(y, want_state.tensors()[name]), name


@pytest.mark.parametrize(
    "heads,slots,window,multiprocessors,splits",
    [(8, 64, 64, 132, 6), (8, 64, 512, 132, 20), (8, 64, 4096, 132, 33), (264, 64, 4096, 132, 1), (64, 64, 0, 132, 4)],
)
def test_choice_of_splits(heads: int, slots: int, window: int, multiprocessors: int, splits: int) -> None:
    assert choose_splits(heads, slots, window, multiprocessors, 32) == splits
