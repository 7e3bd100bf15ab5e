"""Acceptance lines of the kernels: what a CPU, the interpreter and the compilers can say without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from tools.acceptance_base import ROOT, line, run

RESULTS = ROOT / "kernels" / "bench" / "results"
SLOTS_SHAPES = [  # time, window, sinks, query heads per group, rotary dims, mask_empty, head_dim, slots, gates, tau
    (53, 5, 3, 2, 16, True, 16, 16, "normal", 8.0),
    (41, 0, 0, 2, 0, False, 16, 16, "normal", 8.0),
    (70, 37, 4, 2, 8, True, 16, 24, "normal", 8.0),
    (71, 19, 1, 2, 16, True, 16, 16, "mixed", 8.0),
    (71, 19, 1, 2, 16, True, 16, 16, "mixed", 1.0),
    (71, 19, 1, 2, 16, True, 16, 16, "forget", 1.0),
    (71, 19, 1, 2, 16, True, 16, 16, "keep", 1.0),
    (40, 9, 2, 7, 96, True, 96, 80, "normal", 8.0),
]


def _tests() -> None:
    """Make the tests' helpers importable, and Triton interpret the kernels: tensors are on the CPU here."""
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path.insert(0, str(ROOT / "tests" / "kernels"))


@line("triton", "Triton kernels, fp32, vs the fp64 recurrence", "forward <= 2e-6, gradients <= 1e-5 relative")
def triton() -> dict[str, Any]:
    _tests()
    import torch
    from op_cases import case
    from op_cases import run as run_op

    worst = {"forward": 0.0, "gradients": 0.0}
    for time, window, sinks, repeat, rotary, mask_empty, dim, slots, kind, tau in SLOTS_SHAPES:
        x = case(
            time, batch=1, groups=1, repeat=repeat, rotary=rotary, dim=dim, slots=slots, kind=kind, dtype=torch.float32
        )
        options = {"window": window, "sinks": sinks, "mask_empty": mask_empty}
        want = run_op(x, torch.float64, tau, backend="reference", **options)
        got = run_op(x, torch.float32, tau, backend="triton", **options)
        for name, y in want.items():
            if name in got and y.numel() and y.abs().max() > 0:
                error = ((got[name].double() - y).abs().max() / y.abs().max()).item()
                kind_of = "gradients" if name.startswith("d") else "forward"
                worst[kind_of] = max(worst[kind_of], error)
    text = f"forward {worst['forward']:.2g}, gradients {worst['gradients']:.2g} ({len(SLOTS_SHAPES)} cases)"
    return {"measured": text, "met": worst["forward"] <= 2e-6 and worst["gradients"] <= 1e-5, "values": worst}


@line("triton16", "Triton kernels, bf16 and fp16, error over that of PyTorch in the same dtype", "<= 2, all gradients")
def triton16() -> dict[str, Any]:
    _tests()
    import torch
    from nha_kernels import log_decay_from_logits, nha_attention
    from op_cases import case
    from same_dtype import output_and_gradients, same_dtype_attention

    worst: dict[str, float] = {}
    options: dict[str, Any] = {"window": 20, "sinks": 2}
    for dtype in (torch.bfloat16, torch.float16):
        squares: dict[str, list[float]] = {}
        for seed in range(3):
            x = case(100, batch=1, dim=64, slots=32, rotary=64, dtype=dtype, seed=seed)
            exact = ("slot_q_scale", "slot_bias")
            x = {n: y.float() if n in exact else y.to(dtype) for n, y in x.items()}
            x["log_decay"] = log_decay_from_logits(x.pop("logits").float(), 8.0)
            want = output_and_gradients(
                lambda **a: nha_attention(**a, **options, backend="torch")[0], x, cast=torch.float64
            )
            got = output_and_gradients(lambda **a: nha_attention(**a, **options, backend="triton")[0], x)
            plain = output_and_gradients(lambda **a: same_dtype_attention(**a, **options), x)
            for name, y in want.items():
                sums = squares.setdefault(name, [0.0, 0.0])
                for i, z in enumerate((got, plain)):
                    sums[i] += (z[name].double() - y).square().sum().item()
        worst |= {f"{str(dtype)[6:]} {n}": (a / b) ** 0.5 for n, (a, b) in squares.items()}
    low, high = min(worst.values()), max(worst.values())
    largest = max(worst, key=lambda n: worst[n])
    text = f"{low:.2f} to {high:.2f} (largest: {largest}; root mean square over 3 seeds)"
    return {"measured": text, "met": high <= 2, "values": worst}


@line("sdpa", "Triton kernels, W >= T, error over SDPA's own, fp32 and bf16", "within SDPA's own dtype error")
def sdpa() -> dict[str, Any]:
    _tests()
    import torch
    from nha_kernels import log_decay_from_logits, nha_attention
    from op_cases import case

    values = {}
    attend = torch.nn.functional.scaled_dot_product_attention
    for dtype in (torch.float32, torch.bfloat16):
        x = case(120, batch=1, dim=64, rotary=0, dtype=dtype)
        q, k, v = (x[n].transpose(1, 2) for n in "qkv")
        want = attend(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
        low_q, low_k, low_v = (y.to(dtype) for y in (q, k, v))
        theirs = attend(low_q, low_k, low_v, is_causal=True, enable_gqa=True).transpose(1, 2).double() - want
        log_decay = log_decay_from_logits(x["logits"].float(), 8.0)
        low_q, low_k, low_v = (y.transpose(1, 2) for y in (low_q, low_k, low_v))
        o, _ = nha_attention(low_q, low_k, low_v, log_decay, window=120, backend="triton")
        values[str(dtype)[6:]] = ((o.double() - want).norm() / theirs.norm()).item()
    text = ", ".join(f"{name} {ratio:.2f} times SDPA's" for name, ratio in values.items())
    return {"measured": text, "met": max(values.values()) <= 1.1, "values": values}


@line(
    "operators",
    "launches, bytes saved for backward, opcheck, gradcheck, torch.compile(fullgraph=True)",
    "forward 2, backward <= 5, decode <= 2; <= 24 KB per token and layer; all pass",
)
def operators() -> dict[str, Any]:
    _tests()
    import torch
    from costs import counted_launches, saved_bytes_per_token
    from nha_kernels import log_decay_from_logits, nha_attention, nha_decode
    from op_cases import case, cut

    x = {n: y.float() for n, y in case(19, batch=1).items()}
    x["log_decay"] = log_decay_from_logits(x.pop("logits"), 8.0)
    x = {n: y.requires_grad_(n not in ("cos", "sin")) for n, y in x.items()}
    with counted_launches() as forward:
        o, state = nha_attention(**cut(x, slice(0, 18)), window=4, sinks=2, backend="triton", output_final_state=True)
    with counted_launches() as backward:
        o.sum().backward()
    with counted_launches() as decode, torch.no_grad():
        nha_decode(**cut(x, slice(18, 19)), state=state.detach().clone(), backend="triton")
    chosen = ["tests/kernels/test_operators.py", "tests/kernels/test_triton.py::test_gradcheck"]
    counts = []
    for lane in ("not slow", "slow"):
        done = run([sys.executable, "-m", "pytest", "-q", "-m", lane, *chosen], ROOT)
        counts.append(done.stdout.strip().splitlines()[-1].strip("= "))
    saved, numbers = saved_bytes_per_token(), (len(forward), len(backward), len(decode))
    text = (
        f"forward {numbers[0]}, backward {numbers[1]}, decode {numbers[2]}; {saved:.0f} bytes; {' and '.join(counts)}"
    )
    met = numbers[0] == 2 and numbers[1] <= 5 and numbers[2] <= 2 and saved <= 24_000
    return {"measured": text, "met": met, "saved_bytes": saved}


@line(
    "compile",
    "compile table, head_dim 128, M 64, bf16, without a GPU",
    "forward: no spills on sm_90, sm_100, gfx942, <= 16 bytes on sm_80; backward <= 160 bytes",
)
def compile_table() -> dict[str, Any]:
    run([sys.executable, "kernels/bench/compile_table.py", "--check"], ROOT)
    return compile_row(json.loads((RESULTS / "compile.json").read_text(encoding="utf-8"))["rows"])


def compile_row(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Largest spill per target and pass of the limited shapes, and whether any row breaks a limit."""
    limited = [r for r in rows if (r["head_dim"], r["slots"], r["dtype"]) == (128, 64, "bf16")]
    worst: dict[str, dict[str, int]] = {}
    for r in limited:
        passes = worst.setdefault(r["target"], {})
        passes[r["of"]] = max(passes.get(r["of"], 0), r["spills"])
    shown = [f"{target} {', '.join(f'{of} {n}' for of, n in passes.items())}" for target, passes in worst.items()]
    broken = [r for r in rows if r["broken"]]
    text = f"largest spill in bytes over {len(limited)} kernels: {'; '.join(shown)}"
    return {"measured": text, "met": bool(limited) and not broken, "values": worst}


@line(
    "cpu",
    "2 cores, Qwen2.5-0.5B shapes, bf16, all layers NHA, M 64, W 64, vs the teacher with its KV cache",
    "prefill of 16k >= 2.5x (attention alone >= 8x); decode at 32k >= 6x; cache constant, >= 50x smaller",
)
def cpu() -> dict[str, Any]:
    page = RESULTS / "cpu-bf16.json"
    if not page.exists() or not _unchanged(json.loads(page.read_text(encoding="utf-8"))["environment"]["commit"]):
        run([sys.executable, "tools/bench_cpu.py"], ROOT)
    got = json.loads(page.read_text(encoding="utf-8"))
    last, first = got["decode"][-1], got["decode"][0]
    ratios = {
        "prefill": got["prefill"]["ratio"]["median"],
        "attention": got["attention"]["ratio"]["median"],
        "decode": last["ratio"]["median"],
        "cache": last["bytes"]["teacher"] / last["bytes"]["student"],
    }
    constant = first["bytes"]["student"] == last["bytes"]["student"]
    targets = {"prefill": 2.5, "attention": 8.0, "decode": 6.0, "cache": 50.0}
    text = ", ".join(f"{n} {x:.1f}x" for n, x in ratios.items()) + f"; cache {'constant' if constant else 'grows'}"
    return {"measured": text, "met": constant and all(ratios[n] >= t for n, t in targets.items()), "values": ratios}


def _unchanged(commit: str) -> bool:
    """Whether nothing that the CPU benchmark measures differs from a commit."""
    names = ["adjoint", "blocks", "chunked", "core", "decode_torch", "rotary", "segments", "tiles"]
    measured = [f"kernels/nha_kernels/{name}.py" for name in names] + [
        *("nha_convert/modeling", "nha_convert/evaluate/benchmark.py", "tools/bench_cpu.py")
    ]
    return subprocess.run(["git", "diff", "--quiet", commit, "--", *measured], cwd=ROOT).returncode == 0
