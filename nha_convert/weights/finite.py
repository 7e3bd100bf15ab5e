"""Whether raw bytes of a dtype hold NaN or infinity, by integer comparisons on the bits.

The numbers of a float format are ordered as their bits are, separately for each sign, and infinity and NaN stand at the
end of both: two maxima, one over the bits as signed and one as unsigned integers, see them without a temporary array.
"""

from __future__ import annotations

import numpy as np

_LOWEST = {  # the bits of the first value, sign 0, that is not finite
    "F64": (8, 0x7FF0_0000_0000_0000),
    "F32": (4, 0x7F80_0000),
    "C64": (4, 0x7F80_0000),
    "F16": (2, 0x7C00),
    "BF16": (2, 0x7F80),
    "F8_E5M2": (1, 0x7C),
    "F8_E4M3": (1, 0x7F),  # no infinities
}
_ONLY_NAN = {"F8_E4M3FNUZ": 0x80, "F8_E5M2FNUZ": 0x80, "F8_E8M0": 0xFF}


def all_finite(data: memoryview, dtype: str) -> bool:
    """Whether no value is NaN or infinite.

    Args:
        data: whole values, little-endian.
        dtype: as safetensors names it; integers are always finite, and so are the formats below 8 bits.
    """
    if dtype in _ONLY_NAN:
        return not bool((np.frombuffer(data, np.uint8) == _ONLY_NAN[dtype]).any())
    if dtype not in _LOWEST or not len(data):
        return True
    size, lowest = _LOWEST[dtype]
    signed, unsigned = np.frombuffer(data, f"<i{size}"), np.frombuffer(data, f"<u{size}")
    sign = 1 << (8 * size - 1)
    return int(signed.max()) < lowest and int(unsigned.max()) < (lowest | sign)
