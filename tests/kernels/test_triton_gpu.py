"""The Triton kernels on a GPU, at sizes that fill tiles and segments: `pytest -m gpu tests/kernels`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from nha_kernels import log_decay_from_logits, nha_attention, nha_decode, tile_call
from nha_kernels.decode_triton import decode_step_triton
from op_cases import EXACT, FLOAT, attend, case, cut
from same_dtype import output_and_gradients, same_dtype_attention
from triton_checks import padding, wrong

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def on_gpu(time: int, dtype: torch.dtype, **options) -> dict[str, torch.Tensor]:
    """A case with log_decay in place of logits; gates and learnables fp32."""
    x = {n: y.cuda() for n, y in case(time, dtype=dtype, **options).items()}
    x["log_decay"] = log_decay_from_logits(x.pop("logits").float(), 8.0)
    return {n: y.float() if n in ("log_decay", "slot_q_scale", "slot_bias") else y.to(dtype) for n, y in x.items()}


SHAPES = [  # time, groups, repeat, dim, slots, window, sinks
    (300, 2, 4, 128, 64, 64, 4),
    (517, 1, 7, 128, 32, 64, 0),
    (260, 1, 2, 64, 128, 33, 4),
    (200, 1, 1, 96, 64, 17, 2),
    (150, 1, 2, 256, 64, 40, 4),
    (130, 2, 2, 128, 256, 0, 0),
]


@pytest.mark.parametrize("time,groups,repeat,dim,slots,window,sinks", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_error_is_within_twice_pytorchs(time, groups, repeat, dim, slots, window, sinks, dtype):
    x = on_gpu(time, dtype, batch=1, groups=groups, repeat=repeat, dim=dim, slots=slots, rotary=dim)
    options = {"window": window, "sinks": sinks}
    want = output_and_gradients(lambda **a: nha_attention(**a, **options, backend="torch")[0], x, EXACT)
    got = output_and_gradients(lambda **a: nha_attention(**a, **options, backend="triton")[0], x)
    plain = output_and_gradients(lambda **a: same_dtype_attention(**a, **options), x)
    for name, y in want.items():
        ours, theirs = ((z[name].double() - y).norm() for z in (got, plain))
        floor = 1e-5 if dtype == torch.float32 else 1e-2 if name == "dslot_bias" else 0.0
        assert ours <= max(2 * theirs, floor * y.norm()), f"{name}: {ours:.2e} against {theirs:.2e}"


def test_two_runs_are_bit_equal():
    x = on_gpu(700, torch.bfloat16, batch=1, groups=2, repeat=4, dim=128, slots=64, rotary=128)
    runs = [
        output_and_gradients(lambda **a: nha_attention(**a, window=64, sinks=4, backend="triton")[0], x)
        for _ in range(2)
    ]
    assert all(torch.equal(runs[0][n], runs[1][n]) for n in runs[0])


@pytest.mark.parametrize("segments", [2, 7])
def test_segmented_scan(segments, monkeypatch):
    """The last program to finish carries the state; its sums do not depend on which one that is."""
    x = on_gpu(4000, torch.bfloat16, batch=1, groups=2, repeat=2, dim=128, slots=64, rotary=128)
    choose = tile_call.choose_tiling

    def scanned_in(number: int) -> dict[str, torch.Tensor]:
        monkeypatch.setattr(tile_call, "choose_tiling", lambda *args: replace(choose(*args), segments=number))
        return output_and_gradients(lambda **a: nha_attention(**a, window=64, sinks=4, backend="triton")[0], x)

    whole, first, second = scanned_in(1), scanned_in(segments), scanned_in(segments)
    for name, y in whole.items():
        assert torch.equal(first[name], second[name]), name
        assert (first[name].double() - y.double()).norm() <= 5e-3 * y.double().norm(), name


def cuda_case(time: int, **options) -> dict[str, torch.Tensor]:
    return {n: y.cuda() for n, y in case(time, dtype=FLOAT, **options).items()}


@pytest.mark.parametrize(
    "window,sinks,options",
    [
        (5, 3, {}),
        (37, 4, {"mask_empty": False}),
        (11, 2, {"branch": "window"}),
        (11, 2, {"branch": "slots"}),
        (0, 0, {"mask_empty": False, "branch": "slots"}),
    ],
)
def test_every_gradient_in_fp32(window, sinks, options):
    """Two rows, every output, state and gradient against the recurrence."""
    assert not wrong(cuda_case(70), window=window, sinks=sinks, **options)


def test_padding_packing_and_states_in_fp32():
    assert not wrong(cuda_case(38), window=5, sinks=2, padding_mask=padding(38).cuda())
    ends = torch.tensor([0, 13, 13, 16, 50], dtype=torch.int32, device="cuda")
    assert not wrong(cuda_case(50, batch=1), window=7, sinks=2, cu_seqlens=ends)
    x = cuda_case(60)
    _, state = attend(cut(x, slice(0, 21)), window=7, sinks=2, output_final_state=True, backend="torch")
    assert not wrong(cut(x, slice(21, 59)), state=state, window=7, sinks=2, padding_mask=padding(38).cuda())


@pytest.mark.parametrize("splits", [1, 3])
def test_decode_in_fp32(splits):
    x = cuda_case(40, dim=64, rotary=64, slots=32)
    x["log_decay"] = log_decay_from_logits(x.pop("logits"), 8.0)
    want, _ = nha_attention(**x, window=9, sinks=2, backend="reference")
    single = {n: y.float() for n, y in x.items()}
    _, state = nha_attention(**cut(single, slice(0, 30)), window=9, sinks=2, output_final_state=True, backend="triton")
    for t in range(30, 40):
        step = cut(single, slice(t, t + 1))
        first = (step.pop(n) for n in ("q", "k", "v", "log_decay"))
        rest = {"scale": None, "mask_empty": True, "padding_mask": None, "branch": "both", "splits": splits}
        o = decode_step_triton(*first, state, **step, **rest)
        assert (o - want[:, t : t + 1]).abs().max() <= 2e-6 * want.abs().max()


def test_packed_padded_and_carried():
    """Rows of several kinds in one call give what they give alone."""
    x = on_gpu(400, torch.bfloat16, batch=1, groups=2, repeat=2, dim=128, slots=64, rotary=128)
    options = {"window": 64, "sinks": 4, "backend": "triton"}
    whole, _ = nha_attention(**x, **options)
    ends = torch.tensor([0, 130, 400], dtype=torch.int32, device="cuda")
    packed, _ = nha_attention(**x, **options, cu_seqlens=ends)
    alone, _ = nha_attention(**cut(x, slice(0, 130)), **options)
    torch.testing.assert_close(packed[:, :130], alone, rtol=0, atol=0)
    alone, _ = nha_attention(**cut(x, slice(130, 400)), **options)
    torch.testing.assert_close(packed[:, 130:], alone, rtol=0, atol=0)
    first, state = nha_attention(**cut(x, slice(0, 150)), **options, output_final_state=True)
    second, state = nha_attention(**cut(x, slice(150, 399)), **options, initial_state=state, output_final_state=True)
    last = nha_decode(**cut(x, slice(399, 400)), state=state, backend="triton")
    pieces = torch.cat([first, second, last], 1)
    assert (pieces.double() - whole.double()).norm() <= 5e-3 * whole.double().norm()


def test_auto_takes_triton():
    x = on_gpu(100, torch.bfloat16, batch=1, dim=64, rotary=64)
    names = ("window", "sinks")
    auto, _ = nha_attention(**x, **dict(zip(names, (8, 2))))
    named, _ = nha_attention(**x, **dict(zip(names, (8, 2))), backend="triton")
    assert torch.equal(auto, named)
