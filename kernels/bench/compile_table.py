"""Compile every kernel ahead of time, without a GPU, and count registers, spills, shared memory and matrix instructions.

    python kernels/bench/compile_table.py                  the whole table into kernels/bench/results/compile.{json,md}
    python kernels/bench/compile_table.py --targets sm_90 --only forward

The launches of real calls are recorded instead of run, so what is compiled is what a GPU would be given.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "0"
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402
import triton  # noqa: E402
from nha_kernels import tile_call  # noqa: E402
from nha_kernels.tile_call import Options, Tensors, TileCall, choose_tiling  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # KiB per block
MATRIX = {
    "wgmma": r"wgmma\.mma_async",
    "mma.sync": r"\bmma\.sync",
    "tcgen05": r"tcgen05\.mma",
    "mfma": r"v_mfma",
}
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64"}


@dataclass
class Launch:
    """One recorded launch."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]


@dataclass
class Row:
    """What one kernel needs on one target; sizes in bytes."""

    kernel: str
    target: str
    head_dim: int
    slots: int
    dtype: str
    warps: int
    stages: int
    registers: int
    spills: int
    shared: int
    matrix: dict[str, int]
    seconds: float
    error: str = ""


def record(call: Any) -> list[Launch]:
    """Launches that `call()` makes, none of which runs."""
    launches: list[Launch] = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        names = kernel.arg_names
        values = dict(zip(names, args, strict=False)) | {n: options[n] for n in names if n in options}
        constants = {p.name: values[p.name] for p in kernel.params if p.is_constexpr}
        signature = {n: "constexpr" if n in constants else _type(values[n]) for n in names}
        extra = {n: v for n, v in options.items() if n in ("num_warps", "num_stages")}
        launches.append(Launch(kernel, signature, constants, extra))

    with mock.patch.object(JITFunction, "run", run):
        call()
    return launches


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def prefill(dim: int, slots: int, dtype: torch.dtype, arch: str, group: str) -> list[Launch]:
    """The launches of a forward and a backward pass with every option that a recipe turns on."""
    groups, repeat, time_, window, sinks = 2, 4, 256, 64, 4

    def full(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype)

    heads = groups * repeat
    x = Tensors(
        q=full(time_, heads, dim),
        k=full(time_, groups, dim),
        v=full(time_, groups, dim),
        log_decay=full(time_, groups, slots, dtype=torch.float32),
        cos=full(time_, dim),
        sin=full(time_, dim),
        slot_q_scale=full(heads, dim, dtype=torch.float32),
        slot_bias=full(heads, dtype=torch.float32),
        initial=None,
        seen=None,
        starts=None,
        lengths=None,
    )
    options = Options(window, sinks, 0, dim**-0.5, True, True, True, True)
    call = TileCall(x, options, 1, choose_tiling(dim, slots, dtype, arch))
    if group == "forward":
        return record(call.forward)
    lse = full(time_, heads, dtype=torch.float32)
    return record(lambda: call.backward(x.q, lse, x.q, None, None))


def compile_launch(launch: Launch, target: GPUTarget) -> Any:
    """Compile for a target; pointers are taken to be aligned to 16 bytes, as torch allocates them."""
    names = list(launch.signature)
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if launch.signature[n].startswith("*")}
    source = ASTSource(fn=launch.kernel, signature=launch.signature, constexprs=launch.constants, attrs=attributes)
    return triton.compile(source, target=target, options=dict(launch.options))


def measure(launch: Launch, name: str, dim: int, slots: int, dtype: torch.dtype) -> Row:
    """Compile one launch for one target and read its resources."""
    row = Row(
        kernel=launch.kernel.__name__,
        target=name,
        head_dim=dim,
        slots=slots,
        dtype=TYPES[dtype],
        warps=launch.options.get("num_warps", 4),
        stages=launch.options.get("num_stages", 3),
        registers=0,
        spills=0,
        shared=0,
        matrix={},
        seconds=0.0,
    )
    begin = time.monotonic()
    try:
        built = compile_launch(launch, TARGETS[name])
    except Exception as error:
        row.error = " ".join(str(error).split())[-300:]
        return row
    row.seconds = round(time.monotonic() - begin, 1)
    row.shared = built.metadata.shared
    text = built.asm["ptx"] if name.startswith("sm_") else built.asm["amdgcn"]
    row.matrix = {k: len(re.findall(p, text)) for k, p in MATRIX.items() if re.search(p, text)}
    row.registers, row.spills = _nvidia(built.asm["cubin"]) if name.startswith("sm_") else _amd(text)
    return row


def _nvidia(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of stack (spills) per thread."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        out = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", out.stdout)
    assert found, out.stdout
    return int(found[1]), int(found[2])


def _amd(text: str) -> tuple[int, int]:
    """Vector registers per thread and bytes spilled per thread."""

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:?\s+(\d+)", text)
        return int(found[1]) if found else 0

    return field("vgpr_count"), 4 * field("vgpr_spill_count")


CASES = [(128, 64), (128, 32), (128, 128), (64, 64), (96, 64), (256, 64)]


def rows(targets: list[str], group: str, cases: list[tuple[int, int]], dtype: torch.dtype) -> Iterator[Row]:
    """Every kernel of every case on every target."""
    for dim, slots in cases:
        for name in targets:
            with mock.patch.object(tile_call, "INTERPRETED", False):
                for launch in [
                    x
                    for g in ("forward", "backward")
                    if group in (g, "all")
                    for x in prefill(dim, slots, dtype, name, g)
                ]:
                    if group == "backward" or launch.kernel.__name__ != "tile_states" or g_forward(launch):
                        yield measure(launch, name, dim, slots, dtype)


def g_forward(launch: Launch) -> bool:
    return True


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--targets", nargs="*", default=list(TARGETS))
    parser.add_argument("--only", default="all")
    parser.add_argument("--cases", nargs="*", default=["128x64"])
    args = parser.parse_args()
    for row in rows(args.targets, args.only, [tuple(map(int, c.split("x"))) for c in args.cases], torch.bfloat16):
        print(
            f"{row.kernel:14} {row.target:7} d{row.head_dim} M{row.slots} w{row.warps} s{row.stages} regs {row.registers} spill {row.spills} shared {row.shared / 1024:.0f}K {row.matrix} {row.seconds}s {row.error}",
            flush=True,
        )
