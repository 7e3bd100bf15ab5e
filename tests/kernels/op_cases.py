"""Inputs for the op, and one run of it with every gradient."""

from __future__ import annotations

from typing import Any

import torch
from nha_kernels import NHAState, log_decay_from_logits, nha_attention

EXACT, FLOAT = torch.float64, torch.float32
TOLERANCE = {
    EXACT: 1e-11,  # both sides in fp64: rounding only
    FLOAT: 1e-5,  # the contract's number; measured values stay under 3e-6
}
LEARNED = ("q", "k", "v", "logits", "slot_q_scale", "slot_bias")


def logits(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Gate logits: `normal`, `forget` (near -30), `keep` (near 15), `fade` (near -9), or `mixed` from -30 to 15."""
    z = torch.randn(shape, generator=generator, dtype=EXACT)
    if kind == "mixed":
        u = torch.rand(shape, generator=generator, dtype=EXACT)
        return torch.where(u < 0.3, z * 0.1 - 30, torch.where(u < 0.6, z * 0.1 + 15, z))
    return z + {"normal": 0, "forget": -30, "keep": 15, "fade": -9}[kind]


def case(
    time: int,
    *,
    batch: int = 2,
    groups: int = 2,
    repeat: int = 2,
    dim: int = 16,
    slots: int = 8,
    rotary: int = 16,
    kind: str = "normal",
    dtype: torch.dtype = EXACT,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Tensors of one call, all exactly representable in `dtype`, returned in fp64."""
    g = torch.Generator().manual_seed(seed + time)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=EXACT)

    heads = groups * repeat
    tensors = {
        "q": normal(batch, time, heads, dim),
        "k": normal(batch, time, groups, dim),
        "v": normal(batch, time, groups, dim),
        "logits": logits(kind, (batch, time, groups, slots), g),
        "slot_q_scale": 1 + 0.3 * normal(heads, dim),
        "slot_bias": 0.3 * normal(heads),
    }
    if rotary:
        angle = normal(batch, time, rotary // 2)
        tensors |= {"cos": torch.cat([angle.cos()] * 2, -1), "sin": torch.cat([angle.sin()] * 2, -1)}
    return {name: x.to(dtype).to(EXACT) for name, x in tensors.items()}


def cut(tensors: dict[str, torch.Tensor], place: slice) -> dict[str, torch.Tensor]:
    """Some of the tokens."""
    return {name: x if name.startswith("slot") else x[:, place] for name, x in tensors.items()}


def attend(tensors: dict[str, torch.Tensor], tau: float = 8.0, **options: Any) -> Any:
    """`nha_attention` of a case."""
    inputs = dict(tensors)
    log_decay = log_decay_from_logits(inputs.pop("logits"), tau)
    return nha_attention(inputs.pop("q"), inputs.pop("k"), inputs.pop("v"), log_decay, **inputs, **options)


def noise(x: torch.Tensor, seed: int) -> torch.Tensor:
    """Fixed weights for a scalar loss."""
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=EXACT).to(x)


def run(
    tensors: dict[str, torch.Tensor], dtype: torch.dtype, tau: float, state: NHAState | None = None, **options: Any
) -> dict[str, torch.Tensor]:
    """Outputs, final state and the gradients of everything, of a loss in which all of them take part."""
    leaves = {n: x.to(dtype).clone().requires_grad_(n in LEARNED) for n, x in tensors.items()}
    before: dict[str, torch.Tensor] = {}
    if state is not None:
        before = {n: x.to(dtype) if x.is_floating_point() else x for n, x in state.tensors().items()}
        before = {n: x.clone().requires_grad_(n[-1] in "kvy") for n, x in before.items()}  # keys, values, log decay
        state = state.with_tensors(before)
    o, lse, final = attend(leaves, tau, initial_state=state, return_lse=True, output_final_state=True, **options)
    seen = torch.isfinite(lse)
    lse = torch.where(seen, lse, 0.0)
    loss = (o * noise(o, 1)).sum() + (lse * noise(lse, 2)).sum()
    for i, x in enumerate(final.tensors().values()):
        if x.requires_grad:
            loss = loss + (x * noise(x, 3 + i)).sum()
    loss.backward()
    out = {"o": o, "lse": lse, "seen": seen.double()} | {f"final {n}": x for n, x in final.tensors().items()}
    out |= {f"d{n}": leaves[n].grad for n in LEARNED}
    out |= {f"dinitial {n}": x.grad for n, x in before.items() if x.requires_grad}
    return {n: x.detach() for n, x in out.items() if x is not None}


def differences(
    got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], tolerance: float | dict[str, float]
) -> dict[str, str]:
    """Tensors that are missing, or off by more than `tolerance` of their counterpart's largest entry: by how much."""
    found = {}
    for name, x in want.items():
        if not x.numel():
            continue
        size = x.abs().max().item()
        if name not in got:
            found |= {name: "missing"} if size > 0 else {}
            continue
        error = (got[name].double() - x.double()).abs().max().item()
        allowed = tolerance[name] if isinstance(tolerance, dict) else tolerance
        if not error <= allowed * max(size, 1e-30):
            found[name] = f"{error:.2e} of {size:.2e}"
    return found


def assert_close(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], tolerance: float) -> None:
    """Every tensor within `tolerance` of the largest entry of its counterpart."""
    found = differences(got, want, tolerance)
    assert not found, found
