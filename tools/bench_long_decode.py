"""Decode 100,000 tokens with `generate` on the demo's model, all layers NHA: memory and time per token, over time.

    python tools/bench_long_decode.py [--tokens 100000]      (about 10 minutes; an otherwise idle machine)

A machine's own speed drifts by more than what is to be seen. So every 2,500 tokens a short text is decoded anew beside
the long one, and times per token are compared with that control. Writes docs/results/long-decode.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.acceptance_base import ROOT, stamp

os.environ.setdefault("HF_HUB_OFFLINE", "1")
RESULTS = ROOT / "docs" / "results"
PARTS = 10
BATCH = 250
CONTROL_EVERY = 10


class Clock:
    """A streamer that notes pace and memory after every `BATCH` tokens, and now and then the pace of a control."""

    def __init__(self, control: Callable[[], float]) -> None:
        self.control = control
        self.tokens = -1  # the prompt comes first
        self.since = 0.0
        self.rows: list[tuple[int, float, int]] = []
        self.controls: list[tuple[int, float]] = []

    def put(self, value: Any) -> None:
        self.tokens += 1
        if self.tokens <= 0:
            self.controls.append((0, self.control()))
        elif self.tokens % BATCH == 0:
            self.rows.append((self.tokens, (time.perf_counter() - self.since) / BATCH, resident()))
            if len(self.rows) % CONTROL_EVERY == 0:
                self.controls.append((self.tokens, self.control()))
        else:
            return
        self.since = time.perf_counter()

    def end(self) -> None:
        pass


def resident() -> int:
    """Bytes of memory that this process holds."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(tokens: int) -> dict[str, Any]:
    """Rows per part of the decode: median ms per token, highest resident MB."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from nha_convert.settings import NHASettings
    from nha_convert.swap import swap_checkpoint

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        swap_checkpoint("embedded", Path(folder) / "model", NHASettings(), quiet=True)
        tokenizer = AutoTokenizer.from_pretrained(Path(folder) / "model")
        model = AutoModelForCausalLM.from_pretrained(Path(folder) / "model").eval()
        prompt = tokenizer("def main(", return_tensors="pt", return_token_type_ids=False)
        options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        with torch.inference_mode():

            def control() -> float:
                started = time.perf_counter()
                model.generate(**prompt, **options, max_new_tokens=2 * BATCH)
                return (time.perf_counter() - started) / (2 * BATCH)

            control()  # what is allocated once
            clock = Clock(control)
            out = model.generate(
                **prompt, **options, max_new_tokens=tokens, streamer=clock, return_dict_in_generate=True
            )
        state = sum(
            tensor.numel() * tensor.element_size()
            for layer in out.past_key_values.layers
            for tensor in layer.state.tensors().values()
        )
    size = len(clock.rows) // PARTS
    rows = []
    for part in (clock.rows[start * size : (start + 1) * size] for start in range(PARTS)):
        beside = [pace for count, pace in clock.controls if part[0][0] - BATCH <= count <= part[-1][0]]
        pace, control_pace = statistics.median(pace for _, pace, _ in part), statistics.median(beside)
        rows.append(
            {
                "tokens": part[-1][0],
                "ms_per_token": round(1000 * pace, 4),
                "control_ms_per_token": round(1000 * control_pace, 4),
                "ratio": round(pace / control_pace, 4),
                "resident_mb": round(max(memory for *_, memory in part) / 1e6, 1),
            }
        )
    return {"tokens": tokens, "cache_bytes": state, "rows": rows, "layers": model.config.num_hidden_layers}


def judge(result: dict[str, Any]) -> dict[str, Any]:
    """Spread of memory and growth of time, against the limits."""
    memory = [row["resident_mb"] for row in result["rows"]]
    middle = statistics.median(memory)
    spread = max(abs(max(memory) - middle), abs(min(memory) - middle)) / middle
    growth = result["rows"][-1]["ratio"] / result["rows"][0]["ratio"] - 1
    return {
        "memory_spread": round(spread, 4),
        "time_growth": round(growth, 4),
        "met": spread <= 0.02 and growth <= 0.05,
    }


def page(result: dict[str, Any]) -> str:
    table = [
        f"| {row['tokens']:,} | {row['ms_per_token']:.3f} | {row['control_ms_per_token']:.3f} | {row['ratio']:.3f} "
        f"| {row['resident_mb']:.1f} |"
        for row in result["rows"]
    ]
    judged = result["judged"]
    return "\n".join(
        [
            "# Decoding 100,000 tokens",
            "",
            f"The embedded teacher, all {result['layers']} layers NHA (window 64, 64 slots, 4 sinks), fp32, one "
            f"thread, `generate` with one prompt. Cache: {result['cache_bytes']:,} bytes throughout.",
            "",
            "| tokens | ms per token (median) | of a short text at that time | ratio | resident MB (highest) |",
            "|---:|---:|---:|---:|---:|",
            *table,
            "",
            f"Memory within {100 * judged['memory_spread']:.2f} % of its median; last tenth against first: "
            f"{100 * judged['time_growth']:+.1f} % time per token, relative to the short text's.",
            "",
            f"{result['machine']}, commit {result['commit']}, {result['date']}. `{result['command']}`",
            "",
        ]
    )


def run(tokens: int = 100_000) -> dict[str, Any]:
    """Measure, judge and write both files."""
    result = measure(tokens)
    result |= {"judged": judge(result), **stamp("python tools/bench_long_decode.py")}
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "long-decode.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (RESULTS / "long-decode.md").write_text(page(result), encoding="utf-8")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=100_000)
    print(json.dumps(run(parser.parse_args().tokens), indent=2))


if __name__ == "__main__":
    main()
