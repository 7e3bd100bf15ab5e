"""The look at raw bits against torch's own verdict, over every value of the small formats."""

import pytest
import torch

from nha_convert.weights.finite import all_finite

SMALL = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}
LARGE = {"F32": torch.float32, "F64": torch.float64, "C64": torch.complex64}


def data(values: torch.Tensor) -> memoryview:
    return memoryview(values.contiguous().view(torch.uint8).numpy().tobytes())


@pytest.mark.parametrize("name", SMALL)
def test_every_value(name: str) -> None:
    dtype = SMALL[name]
    bits = torch.arange(1 << (8 * dtype.itemsize)).to(torch.uint16 if dtype.itemsize == 2 else torch.uint8)
    wanted = bits.view(dtype).float().isfinite()
    assert 0 < (~wanted).sum() < len(bits)
    raw, size = data(bits), dtype.itemsize
    found = [all_finite(raw[i : i + size], name) for i in range(0, len(raw), size)]
    assert found == wanted.tolist()
    assert all_finite(data(bits[wanted]), name) and not all_finite(raw, name)


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), float("-inf")])
def test_one_among_many(name: str, value: float) -> None:
    real = torch.float32 if name == "C64" else LARGE[name]
    info = torch.finfo(real)
    edges = torch.tensor([info.max, info.min, info.tiny, -info.tiny, 0.0, -0.0, info.smallest_normal / 2], dtype=real)
    values = torch.cat((edges, torch.randn(1001, dtype=real))).repeat(2)
    assert all_finite(data(values), name)
    for place in (0, 500, len(values) - 1):
        wrong = values.clone()
        wrong[place] = value
        assert not all_finite(data(wrong), name)


@pytest.mark.parametrize("name", ["I64", "I8", "U8", "BOOL", "F4"])
def test_integers_are_finite(name: str) -> None:
    assert all_finite(memoryview(b"\xff" * 64), name)


@pytest.mark.parametrize("name", [*SMALL, *LARGE])
def test_nothing_is_finite(name: str) -> None:
    assert all_finite(memoryview(b""), name)
