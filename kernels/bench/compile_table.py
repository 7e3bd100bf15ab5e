"""Compile every kernel ahead of time, without a GPU: registers, spills, shared memory, matrix instructions.

    python kernels/bench/compile_table.py                  the whole table into kernels/bench/results/compile.{json,md}
    python kernels/bench/compile_table.py --check          exit code 1 where a limit is broken
    python kernels/bench/compile_table.py --targets sm_90 --cases 'd128-m64-bf16-*' --kernels attend --out attend

The launches of real calls are recorded instead of run, so what is compiled is what a GPU would be given. Kernels that
Triton's cache holds are not compiled again; their time is then unknown.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "0"
HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402
import triton  # noqa: E402
from nha_kernels.decode_triton import decode_step_triton  # noqa: E402
from nha_kernels.state import NHAState  # noqa: E402
from nha_kernels.tile_call import Options, Tensors, TileCall  # noqa: E402
from nha_kernels.tiling import choose_tiling  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from bench.compile_rows import Row, broken, cells, page  # noqa: E402
from bench.environment import commit  # noqa: E402
from bench.report import write  # noqa: E402

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MATRIX = {"wgmma": r"wgmma\.mma_async", "mma.sync": r"\bmma\.sync", "tcgen05": r"tcgen05\.mma", "mfma": r"v_mfma"}
FMA = r"\bfma\.rn|\bv_(?:pk_)?fma"  # what exact products of fp32 become where no matrix instruction takes them
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}
GROUPS, REPEAT, TIME, WINDOW, SINKS = 2, 4, 256, 64, 4
SIZES = ((128, 64), (128, 32), (128, 128), (64, 64), (96, 64), (256, 64), (128, 256))
VARIANTS = ("ragged", "initial", "segmented", "bare")


@dataclass(frozen=True)
class Case:
    """One problem.

    `recipe` turns on what recipes turn on. `ragged`: padding or cu_seqlens. `initial`: a later chunk of two rows that
    share cos and sin, with the gradients of lse and of the final state. `segmented`: the state scan in two segments.
    `bare`: no window, rotation, sinks or learnables, empty slots not masked.
    """

    head_dim: int
    slots: int
    dtype: torch.dtype = torch.bfloat16
    variant: str = "recipe"

    def __str__(self) -> str:
        return f"d{self.head_dim}-m{self.slots}-{TYPES[self.dtype]}-{self.variant}"


def plan() -> list[tuple[Case, tuple[str, ...]]]:
    """Every case with its targets."""
    cases = [Case(d, m) for d, m in SIZES] + [Case(128, 64, x) for x in (torch.float16, torch.float32)]
    return [(c, tuple(TARGETS)) for c in cases] + [(Case(128, 64, variant=v), ("sm_90",)) for v in VARIANTS]


@dataclass
class Launch:
    """One recorded launch."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]


def record(call: Callable[[], object]) -> list[Launch]:
    """Launches that `call()` makes, none of which runs."""
    launches: list[Launch] = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        names = kernel.arg_names
        values = dict(zip(names, args)) | {n: options[n] for n in names if n in options}
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


def prefill(case: Case, arch: str, backward: bool) -> list[Launch]:
    """Launches of a forward or a backward pass."""
    bare, initial, ragged = (case.variant == n for n in ("bare", "initial", "ragged"))
    documents, heads = 2 if initial or ragged else 1, GROUPS * REPEAT
    sinks, window = (0, 0) if bare else (SINKS, WINDOW)
    past = window + sinks if initial else 0
    places = TIME + documents * past
    numbers = torch.zeros(documents, dtype=torch.int64)
    turns = torch.zeros(places // documents if initial else places, case.head_dim, dtype=case.dtype)
    states = torch.zeros(2, documents, GROUPS, case.slots, case.head_dim)
    x = Tensors(
        q=torch.zeros(TIME, heads, case.head_dim, dtype=case.dtype),
        k=torch.zeros(places, GROUPS, case.head_dim, dtype=case.dtype),
        v=torch.zeros(places, GROUPS, case.head_dim, dtype=case.dtype),
        log_decay=torch.zeros(places, GROUPS, case.slots),
        cos=None if bare else turns,
        sin=None if bare else turns,
        slot_q_scale=None if bare else torch.zeros(heads, case.head_dim),
        slot_bias=None if bare else torch.zeros(heads),
        initial=states if initial else None,
        seen=numbers if initial else None,
        starts=numbers if ragged else None,
        lengths=numbers if ragged else None,
    )
    options = Options(window, sinks, past, case.head_dim**-0.5, not bare, True, not bare, True)
    tiling = choose_tiling(case.head_dim, case.slots, case.dtype, arch, backward)
    if case.variant == "segmented":
        tiling = replace(tiling, segments=2)
    call = TileCall(x, options, documents, tiling, backward)
    if not backward:
        return record(call.forward)
    lse = torch.zeros(TIME, heads)
    return record(lambda: call.backward(x.q, lse, x.q, lse if initial else None, states if initial else None))


def decode(case: Case, splits: int) -> list[Launch]:
    """Launches of one decoding step; `ragged` takes a padding mask."""
    bare, heads = case.variant == "bare", GROUPS * REPEAT
    sinks, window = (0, 0) if bare else (SINKS, WINDOW)
    sizes, rotary = (1, GROUPS, case.slots, case.head_dim), 0 if bare else case.head_dim
    state = NHAState.new(*sizes, window=window, sinks=sinks, rotary_dim=rotary, dtype=case.dtype)
    turns = None if bare else torch.zeros(1, 1, case.head_dim, dtype=case.dtype)
    new = torch.zeros(1, 1, GROUPS, case.head_dim, dtype=case.dtype)
    return record(
        lambda: decode_step_triton(
            torch.zeros(1, 1, heads, case.head_dim, dtype=case.dtype),
            new,
            new,
            torch.zeros(1, 1, GROUPS, case.slots),
            state,
            cos=turns,
            sin=turns,
            scale=None,
            mask_empty=not bare,
            slot_q_scale=None if bare else torch.zeros(heads, case.head_dim),
            slot_bias=None if bare else torch.zeros(heads),
            padding_mask=torch.ones(1, 1, dtype=torch.bool) if case.variant == "ragged" else None,
            branch="slots" if bare else "both",
            splits=splits,
        )
    )


def launches(case: Case, arch: str) -> Iterator[tuple[str, Launch]]:
    """Every launch of a case, each with what it is part of."""
    for of, some in (
        ("forward", lambda: prefill(case, arch, False)),
        ("backward", lambda: prefill(case, arch, True)),
        ("decode", lambda: decode(case, 1)),
        ("decode split", lambda: decode(case, 2)),
    ):
        if case.variant not in ("initial", "segmented") or "decode" not in of:
            yield from ((of, x) for x in some())


def compile_launch(launch: Launch, target: GPUTarget) -> tuple[Any, float | None]:
    """Compile for a target, with what the launcher would know of pointers: aligned, and on AMD under 2 GiB.

    Returns:
        the kernel and the seconds it took, None if the cache had it.
    """
    known = [["tt.divisibility", 16]] + ([["tt.pointer_range", 32]] if target.backend == "hip" else [])
    types = list(launch.signature.values())
    attributes = {(i,): known for i, t in enumerate(types) if t.startswith("*")}
    source = ASTSource(fn=launch.kernel, signature=launch.signature, constexprs=launch.constants, attrs=attributes)
    seconds: list[float | None] = []

    def listen(*, times: Any, cache_hit: bool, **_: Any) -> None:
        seconds.append(None if cache_hit else round(times.total / 1e6, 2))

    with mock.patch.object(triton.knobs.compilation, "listener", listen):
        built = triton.compile(source, target=target, options=dict(launch.options))
    return built, seconds[-1]


def measure(launch: Launch, of: str, case: Case, target: str) -> Row:
    """Compile one launch for one target and read its resources."""
    row = Row(of, launch.kernel.__name__, target, case.head_dim, case.slots, TYPES[case.dtype], case.variant)
    blocks = [n for n in ("BT", "BN", "BM", "BD") if n in launch.constants]
    row.rows, row.tile = launch.constants.get("BT", 0), " ".join(f"{n}{launch.constants[n]}" for n in blocks)
    row.warps, row.stages = launch.options.get("num_warps", 4), launch.options.get("num_stages", 3)
    try:
        built, row.seconds = compile_launch(launch, TARGETS[target])
    except Exception as error:  # whatever the compiler throws is a result
        row.error = f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"
    else:
        nvidia = TARGETS[target].backend == "cuda"
        text = built.asm["ptx" if nvidia else "amdgcn"]
        kinds = MATRIX | ({"fma": FMA} if case.dtype == torch.float32 else {})
        row.shared = built.metadata.shared
        row.dots = len(re.findall(r"\btt\.dot\b", built.asm["ttir"]))
        row.matrix = {k: n for k, p in kinds.items() if (n := len(re.findall(p, text)))}
        row.registers, row.spills = _nvidia(built.asm["cubin"]) if nvidia else _amd(text)
    row.broken = broken(row)
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
    """Vector registers per thread (accumulators included) and bytes of private memory per thread."""

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:?\s+(\d+)", text)
        assert found, name
        return int(found[1])

    return number("vgpr_count"), max(4 * number("vgpr_spill_count"), number("private_segment_fixed_size"))


def table(cases: list[tuple[Case, list[str]]], kernels: str) -> Iterator[Row]:
    """Every kernel whose name matches, of every case on its targets."""
    for case, targets in cases:
        for target in targets:
            for of, launch in launches(case, target):
                if fnmatchcase(launch.kernel.__name__, kernels):
                    yield measure(launch, of, case, target)


def save(out: Path, rows: list[Row], arguments: list[str], at: dict[str, Any]) -> None:
    """Write compile.json and compile.md, each beside its place first; `at` is the commit compiled."""
    results = {
        "triton": triton.__version__,
        "torch": torch.__version__,
        "commit": at,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "kernels/bench/compile_table.py", *arguments]),
        "rows": [asdict(r) for r in rows],
    }
    texts = {"compile.json": json.dumps(results, indent=1) + "\n", "compile.md": page(results, rows)}
    for name, text in texts.items():
        write(out / name, partial(Path.write_text, data=text, encoding="utf-8"))


def main(arguments: list[str]) -> int:
    """Compile, show and write the table."""
    parser = argparse.ArgumentParser(description="Compile every kernel ahead of time, without a GPU.")
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--cases", nargs="+", default=["*"], metavar="GLOB", help="as in d128-m64-bf16-recipe")
    parser.add_argument("--kernels", default="*", metavar="GLOB")
    parser.add_argument("--check", action="store_true", help="exit code 1 where a limit is broken")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of compile.json and compile.md")
    args = parser.parse_args(arguments)
    chosen = [
        (case, [t for t in args.targets if t in targets])
        for case, targets in plan()
        if any(fnmatchcase(str(case), glob) for glob in args.cases)
    ]
    rows, at = [], commit(ROOT, None)
    for row in table(chosen, args.kernels):
        print(*cells(row), sep="  ", flush=True)
        rows.append(row)
    if not rows:
        parser.error("no case, target and kernel fit; cases: " + ", ".join(str(c) for c, _ in plan()))
    save(args.out, rows, [x if x != str(args.out) else "DIR" for x in arguments], at)
    failed = [row for row in rows if row.broken]
    print(f"{len(rows)} kernels, {len(failed)} break a limit")
    return 1 if failed and args.check else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
