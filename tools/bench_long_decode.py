"""Decode 100,000 tokens with `generate` on the demo's model, all layers NHA: memory and time per token, over time.

    python tools/bench_long_decode.py [--tokens 100000]      (about 10 minutes; an otherwise idle machine)

Writes docs/results/long-decode.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.acceptance_base import ROOT, stamp

os.environ.setdefault("HF_HUB_OFFLINE", "1")
RESULTS = ROOT / "docs" / "results"
PARTS = 10
BATCH = 500


class Clock:
    """A streamer that notes the time and the memory after every `BATCH` tokens."""

    def __init__(self) -> None:
        self.tokens = -1  # the prompt comes first
        self.rows: list[tuple[int, float, int]] = []

    def put(self, value: Any) -> None:
        self.tokens += 1
        if self.tokens > 0 and self.tokens % BATCH == 0:
            self.rows.append((self.tokens, time.perf_counter(), resident()))

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
            model.generate(**prompt, **options, max_new_tokens=2 * BATCH)  # what is allocated once
            clock = Clock()
            out = model.generate(
                **prompt, **options, max_new_tokens=tokens, streamer=clock, return_dict_in_generate=True
            )
        state = sum(
            tensor.numel() * tensor.element_size()
            for layer in out.past_key_values.layers
            for tensor in layer.state.tensors().values()
        )
    paces = [
        (count, 1000 * (later - earlier) / BATCH, memory)
        for (_, earlier, _), (count, later, memory) in zip(clock.rows, clock.rows[1:], strict=False)
    ]
    size = len(paces) // PARTS
    parts = [paces[part * size : (part + 1) * size] for part in range(PARTS)]
    rows = [
        {
            "tokens": part[-1][0],
            "ms_per_token": round(statistics.median(pace for _, pace, _ in part), 4),
            "resident_mb": round(max(memory for *_, memory in part) / 1e6, 1),
        }
        for part in parts
    ]
    return {"tokens": tokens, "cache_bytes": state, "rows": rows, "layers": model.config.num_hidden_layers}


def judge(result: dict[str, Any]) -> dict[str, Any]:
    """Spread of memory and growth of time, against the limits."""
    memory = [row["resident_mb"] for row in result["rows"]]
    middle = statistics.median(memory)
    spread = max(abs(max(memory) - middle), abs(min(memory) - middle)) / middle
    growth = result["rows"][-1]["ms_per_token"] / result["rows"][0]["ms_per_token"] - 1
    return {
        "memory_spread": round(spread, 4),
        "time_growth": round(growth, 4),
        "met": spread <= 0.02 and growth <= 0.05,
    }


def page(result: dict[str, Any]) -> str:
    table = [
        f"| {row['tokens']:,} | {row['ms_per_token']:.3f} | {row['resident_mb']:.1f} |" for row in result["rows"]
    ]
    judged = result["judged"]
    return "\n".join(
        [
            "# Decoding 100,000 tokens",
            "",
            f"The embedded teacher, all {result['layers']} layers NHA (window 64, 64 slots, 4 sinks), fp32, one "
            f"thread, `generate` with one prompt. Cache: {result['cache_bytes']:,} bytes throughout.",
            "",
            "| tokens | ms per token (median) | resident MB (highest) |",
            "|---:|---:|---:|",
            *table,
            "",
            f"Memory within {100 * judged['memory_spread']:.2f} % of its median; last tenth against first: "
            f"{100 * judged['time_growth']:+.1f} % time per token.",
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
