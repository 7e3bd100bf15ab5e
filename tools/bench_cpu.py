"""Measure NHA on the CPU against the teacher with its KV cache; write kernels/bench/results/cpu-bf16.{json,md}.

    python tools/bench_cpu.py                                                      Qwen2.5-0.5B's shapes (27 minutes)
    python tools/bench_cpu.py --tokens 512 --layers 2 --vocabulary 1000 --contexts 128 1024 --out /tmp/cpu    seconds

A randomly initialised model of those shapes is converted in memory, so that every layer is NHA; the teacher is the same
model in teacher mode (the base model's own attention on the same weights, `DynamicCache`). Teacher and student take
turns in one process. The teacher's cache for decoding is filled with random keys and values instead of a prefill.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from nha_kernels import log_decay_from_logits, nha_attention  # noqa: E402
from transformers import AutoModelForCausalLM, Qwen2Config  # noqa: E402

from nha_convert.convert import nha_config  # noqa: E402
from nha_convert.evaluate import benchmark  # noqa: E402
from nha_convert.evaluate.benchmark import MODES, in_turns, prefill, timed  # noqa: E402
from nha_convert.evaluate.benchmark_table import brackets  # noqa: E402
from nha_convert.gate_init import init_gates  # noqa: E402
from nha_convert.modeling.attention_nha import nha_layers, teacher_mode  # noqa: E402
from nha_convert.provenance import processor  # noqa: E402
from nha_convert.settings import EvaluateSettings, NHASettings  # noqa: E402
from tools.readme import write_block  # noqa: E402

HEADS, GROUPS, DIM, HIDDEN, INTERMEDIATE = 14, 2, 64, 896, 4864
SLOTS, WINDOW, SINKS = 64, 64, 4
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
RESULTS = ROOT / "kernels" / "bench" / "results"
WARM_UP = 256
"""Tokens of an untimed prefill of each."""
TARGETS = {"prefill": 2.5, "attention": 8.0, "decode": 6.0, "cache": 50.0}  # times better than the teacher


def arguments() -> argparse.Namespace:
    """The command line; defaults are the acceptance sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384, help="tokens of the prefill and of the attention alone")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 8192, 32768], help="of the decode steps")
    parser.add_argument("--chunk", type=int, default=2048, help="tokens per call of the chunked prefill; 0: leave out")
    parser.add_argument("--repeats", type=int, default=6, help="prefills of each, the faster way; the median counts")
    parser.add_argument("--attention-repeats", type=int, default=21, help="runs of the attention alone")
    parser.add_argument("--steps", type=int, default=15, help="timed decode steps per context")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16", help="bf16 is what transformers loads")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def build(options: argparse.Namespace) -> Any:
    """The converted model, random weights, gates in fp32 and the rest in `options.dtype`, in eval mode."""
    base = Qwen2Config(
        vocab_size=options.vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=options.layers,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(nha_config(base, NHASettings(window=WINDOW, slots=SLOTS, sinks=SINKS)))
    init_gates(model, "spread", seed=0)
    model.to(DTYPES[options.dtype])
    for _, layer in nha_layers(model):
        layer.nha.float()
    return model.eval()


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


def measure_prefill(model: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds for all tokens: each way once, at once and in chunks, then teacher and student by turns in their faster.

    Turns that show another way to be the faster one are taken again.

    Returns:
        {"tried": {mode: {tokens per call: seconds}}, "calls": {mode: tokens per call of the turns}, "teacher",
        "student", "ratio"}, the last three as `in_turns` has them; tokens per call are strings, as in JSON.
    """
    ids = torch.randint(0, options.vocabulary, (1, options.tokens))

    def seconds(mode: str, chunk: int, ids: torch.Tensor = ids) -> float:
        with teacher_mode(model) if mode == "teacher" else contextlib.nullcontext():
            taken = timed(lambda: prefill(model, ids, chunk))
        say(f"prefill of {ids.shape[1]} in calls of {chunk}, {mode}: {taken:.2f} s")
        return taken

    for mode in MODES:
        seconds(mode, WARM_UP, ids[:, :WARM_UP])
    ways = [str(chunk) for chunk in (options.tokens, options.chunk) if chunk]
    tried: dict[str, dict[str, float]] = {mode: {} for mode in MODES}
    for way in ways:
        for mode in MODES:
            tried[mode][way] = seconds(mode, int(way))
    known = {mode: dict(tried[mode]) for mode in MODES}
    calls: dict[str, str] = {}
    runs: dict[str, list[float]] = {}
    for _ in ways:
        faster = {mode: min(ways, key=known[mode].__getitem__) for mode in MODES}
        if faster == calls:
            break
        calls, runs = faster, {mode: [] for mode in MODES}
        for _ in range(options.repeats):
            for mode in MODES:
                runs[mode].append(seconds(mode, int(calls[mode])))
        known = {mode: known[mode] | {calls[mode]: statistics.median(runs[mode])} for mode in MODES}
    return {"tried": tried, "calls": calls} | in_turns(runs)


def measure_attention(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of one layer's attention: the op (rotation and final state included) and causal SDPA (without)."""
    tokens, dtype = options.tokens, DTYPES[options.dtype]

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).to(dtype)

    q, k, v = normal(1, tokens, HEADS, DIM), normal(1, tokens, GROUPS, DIM), normal(1, tokens, GROUPS, DIM)
    log_decay = log_decay_from_logits(torch.randn(1, tokens, GROUPS, SLOTS) + 3, 8.0)
    angle = torch.randn(1, tokens, DIM // 2)
    cos, sin = (torch.cat([x] * 2, -1).to(dtype) for x in (angle.cos(), angle.sin()))
    scale, bias = torch.ones(HEADS, DIM), torch.zeros(HEADS)
    query, key, value = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    settings: dict[str, Any] = {
        "window": WINDOW,
        "sinks": SINKS,
        "cos": cos,
        "sin": sin,
        "slot_q_scale": scale,
        "slot_bias": bias,
    }

    def student() -> None:
        nha_attention(q, k, v, log_decay, **settings, output_final_state=True)

    def teacher() -> None:
        F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    runs: dict[str, list[float]] = {"student": [], "teacher": []}
    student()
    for _ in range(options.attention_repeats):
        runs["student"].append(timed(student))
        runs["teacher"].append(timed(teacher))
    say(f"attention {tokens}: " + ", ".join(f"{name} {min(x):.3f} to {max(x):.3f} s" for name, x in runs.items()))
    return in_turns(runs)


def measure_decode(model: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Per context: seconds per token of both, step by step in turns, and the bytes of their caches."""
    settings = EvaluateSettings(benchmark_repeats=options.steps, benchmark_seconds=1e9)
    rows = []
    for context in options.contexts:
        measured = benchmark.measure_decode({"student": model, "teacher": model}, context, settings)
        row: dict[str, Any] = {"context": context, "bytes": measured["cache_bytes"]}
        row |= {name: measured[name] for name in (*MODES, "ratio")}
        both = (f"{mode} {row[mode]['median'] * 1e3:.1f} ms" for mode in MODES)
        say(f"decode at {context}: {', '.join(both)}")
        rows.append(row)
    return rows


def environment() -> dict[str, Any]:
    """Machine, versions, commit, date and command."""
    git = ["git", "-C", str(ROOT)]
    changed = subprocess.run([*git, "status", "--porcelain", "kernels/nha_kernels"], capture_output=True, text=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip() or None
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "commit": commit,
        "uncommitted_kernels": bool(changed.stdout.strip()) if changed.returncode == 0 else None,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", "tools/bench_cpu.py", *sys.argv[1:]]),
    }


def table(results: dict[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """Rows: what, teacher, student, target and measured ratio."""
    sizes, prefills, attention = results["sizes"], results["prefill"], results["attention"]
    tokens, rows = sizes["tokens"], []

    def row(what: str, measured: dict[str, Any], unit: str, factor: float, target: float | None) -> None:
        wanted = "" if target is None else f">= {target:g}x"
        theirs, ours = (f"{measured[mode]['median'] * factor:.4g} {unit}" for mode in MODES)
        ratio = measured["ratio"]
        spread = f"({ratio['low']:.2f} to {ratio['high']:.2f})"
        rows.append((what, theirs, ours, wanted, f"{ratio['median']:.2f}x {spread}"))

    row(f"prefill of {tokens}", prefills, "s", 1, TARGETS["prefill"])
    row(f"attention alone, {tokens} tokens, one layer", attention, "ms", 1e3, TARGETS["attention"])
    last = results["decode"][-1]["context"]
    for step in results["decode"]:
        target = TARGETS["decode"] if step["context"] == last else None
        row(f"decode per token at {step['context']}", step, "ms", 1e3, target)
    for step in results["decode"]:
        wanted = f">= {TARGETS['cache']:g}x" if step["context"] == last else ""
        theirs, ours = (step["bytes"][mode] for mode in MODES)
        megabytes = f"{theirs * 1e-6:.4g} MB", f"{ours * 1e-6:.4g} MB"
        rows.append((f"cache at {step['context']}", *megabytes, wanted, f"{theirs / ours:.2f}x"))
    return rows


def counted(results: dict[str, Any]) -> str:
    """What the rows are medians of, how sure their intervals are, and in which calls the prompt was read."""
    sizes, prefills = results["sizes"], results["prefill"]
    timed_rows = [prefills["ratio"], results["attention"]["ratio"], *(row["ratio"] for row in results["decode"])]
    ways = {mode: [f"{s:.3g} s in calls of {c}" for c, s in prefills["tried"][mode].items()] for mode in MODES}
    tried = "; ".join(f"{mode} {', '.join(times)}" for mode, times in ways.items())
    return (
        f"Medians of {sizes['repeats']} prefills, {sizes['attention_repeats']} runs of the attention and "
        f"{sizes['steps']} decoded tokens; measured is the median of the turns' ratios, in brackets "
        f"{brackets(*timed_rows)}. Each reads the prompt in its faster way; each way once: {tried}."
    )


def page(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    e, sizes = results["environment"], results["sizes"]
    uncommitted = " and uncommitted changes" if e["uncommitted_kernels"] else ""
    lines = [
        "# CPU",
        "",
        f"Made by `{e['command']}` on {e['date']}, commit {e['commit']}{uncommitted}: {e['cpu']} ({e['capability']}), "
        f"{e['cores']} cores, {e['threads']} threads, torch {e['torch']}, {sizes['dtype']} (the op computes in fp32).",
        "",
        f"Random weights in Qwen2.5-0.5B's shapes ({sizes['layers']} layers, vocabulary {sizes['vocabulary']}), every "
        f"layer NHA with W {WINDOW}, M {SLOTS}, {SINKS} sinks. The teacher is the same model in teacher mode, with "
        "SDPA and its `DynamicCache`; both run in one process, in turns. "
        f"{counted(results)} Random numbers are seeded with 0. "
        "For decoding, the teacher's cache is filled with random keys and values; the student reads a few windows, and "
        "its position is moved to the context.",
        "",
        "| | teacher | NHA | target | measured |",
        "|---|---|---|---|---|",
    ]
    lines += ["| " + " | ".join(row) + " |" for row in table(results)]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write."""
    options = arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    names = ("tokens", "layers", "vocabulary", "chunk", "repeats", "attention_repeats", "steps", "dtype")
    results: dict[str, Any] = {"environment": environment(), "sizes": {name: getattr(options, name) for name in names}}
    with torch.inference_mode():
        results["attention"] = measure_attention(options)
        model = build(options)
        results["decode"] = measure_decode(model, options)
        results["prefill"] = measure_prefill(model, options)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"cpu-{options.dtype}.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (options.out / f"cpu-{options.dtype}.md").write_text(page(results), encoding="utf-8")
    print(page(results))
    if options.dtype == "bf16" and options.out == RESULTS:
        write_readme(results)


def write_readme(results: dict[str, Any]) -> None:
    """README's table of the CPU."""
    e = results["environment"]
    note = (
        f"Qwen2.5-0.5B's shapes, all layers NHA, M {SLOTS}, W {WINDOW}, bf16, {e['cores']} cores of {e['cpu']}, seed "
        f"0, teacher and student in turns. {counted(results)}"
    )
    header, rows = ["", "teacher", "NHA", "target", "measured"], [list(row) for row in table(results)]
    write_block("cpu-table", header, rows, note + " Written by `python tools/bench_cpu.py`.")


if __name__ == "__main__":
    main()
