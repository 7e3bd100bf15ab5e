"""Measure the swap of a large checkpoint against `cp` of the same files; write docs/results/swap.{json,md}.

    python tools/bench_swap.py                                    Llama-3.1-8B's shapes, bf16, 16 GB (20 minutes)
    python tools/bench_swap.py --shape 3b                         Llama-3.2-3B's, 6.4 GB
    python tools/bench_swap.py --shape pico --rounds 1 --out /tmp/swap                                      seconds

The checkpoint holds one block of random numbers over and over. Each command runs in a process of its own, in turns,
with none of the source's bytes in the page cache, and its time counts until what it wrote is on the disk. Peak memory
is what the kernel recorded for the process (VmHWM), and the largest sample of its anonymous part (RssAnon); what a swap
of a tiny model takes, which is Python, torch and transformers, is subtracted for the added memory.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig  # noqa: E402

from nha_convert.weights.base_shards import plan_shards  # noqa: E402
from nha_convert.weights.shard_files import create_shard, write_tensor  # noqa: E402
from nha_convert.weights.weight_files import StoredTensor  # noqa: E402

RESULTS = ROOT / "docs" / "results"
KEPT_FREE = 15 * 10**9
BLOCK = 1 << 24
_SMALL = {"num_attention_heads": 4, "num_key_value_heads": 2}
SHAPES: dict[str, dict[str, Any]] = {
    "8b": {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 8},
    "3b": {"vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28}
    | {"num_attention_heads": 24, "num_key_value_heads": 8, "tie_word_embeddings": True},
    "pico": {"vocab_size": 264, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2} | _SMALL,
}
WAYS = {"swap": [], "swap --copy": ["--copy"], "swap --max-shard-size 2GB": ["--max-shard-size", "2GB"]}
WEIGHTS = ("base_shards", "gate_shards", "shard_files", "finite", "weight_files", "tensor_check")
MEASURED = ("swap.py", *(f"weights/{name}.py" for name in WEIGHTS))
"""The modules that the result rests on."""


def make_checkpoint(folder: Path, shape: str) -> int:
    """Write a random bf16 Llama in shards of at most 5 GB, block by block; its size in bytes."""
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=131072, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    tensors = {
        name: StoredTensor("BF16", tuple(tensor.shape), folder, 0, 0)
        for name, tensor in model.state_dict().items()
        if name not in tied
    }
    numbers = np.random.default_rng(0).normal(0, 0.02, BLOCK // 2).astype(np.float32)
    block = (numbers.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).data
    folder.mkdir()
    config.save_pretrained(folder)
    weight_map: dict[str, str] = {}
    total = 0
    for file, names in plan_shards(tensors, "model{suffix}.safetensors", "5GB").items():
        places = create_shard(folder / file, {name: ("BF16", tensors[name].shape) for name in names})
        weight_map |= dict.fromkeys(names, file)
        for place in places.values():
            for start in range(place.start, place.end, BLOCK):
                part = block[: min(BLOCK, place.end - start)]
                write_tensor(StoredTensor("BF16", (), place.path, start, start + len(part)), part)
                total += len(part)
    if len(set(weight_map.values())) > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return total


def forget(folder: Path) -> None:
    """Bring a folder's files to the disk and drop them from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(command: list[str], out: Path) -> dict[str, float]:
    """Run a command that makes `out`: seconds until it ends and until all is on the disk, and its peak memory."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak, anonymous = 0, 0
    while process.poll() is None:
        peak = max(peak, status_bytes(process.pid, "VmHWM"))
        anonymous = max(anonymous, status_bytes(process.pid, "RssAnon"))
        time.sleep(0.01)
    seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit {process.returncode}")
    for path in out.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    on_disk = time.perf_counter() - started
    return {"seconds": seconds, "on_disk": on_disk, "peak": peak, "anonymous": anonymous}


def status_bytes(pid: int, field: str) -> int:
    """A field of /proc/PID/status; 0 once the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), 0)


def measure_all(folder: Path, source: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Medians over the rounds, by command; in each round every command runs once."""
    cli = [sys.executable, str(ROOT / "cli.py"), "swap", str(source), str(folder / "out"), "--quiet"]
    commands = {"cp": ["cp", "-r", str(source), str(folder / "out")]}
    commands |= {name: cli + flags for name, flags in WAYS.items()}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for number in range(rounds):
        for name, command in commands.items():
            forget(source)
            found[name].append(measure(command, folder / "out"))
            shutil.rmtree(folder / "out")
            os.sync()
            print(f"round {number + 1}, {name}: {json.dumps(found[name][-1])}", file=sys.stderr, flush=True)
    return {
        name: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for name, rows in found.items()
    }


def sources() -> str:
    """A hash of the measured modules."""
    files = [ROOT / "nha_convert" / name for name in MEASURED]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def environment() -> dict[str, Any]:
    """Machine, versions, commit, date and command."""
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip() or None
    changed = subprocess.run([*git, "status", "--porcelain", "nha_convert"], capture_output=True, text=True)
    cpus = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = [line.split(":")[1].strip() for line in cpus if line.startswith("model name")]
    return {
        "command": "python tools/" + " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "uncommitted": bool(changed.stdout.strip()) if changed.returncode == 0 else None,
        "sources": sources(),
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def table(results: dict[str, Any]) -> str:
    """The page that is read."""
    e, rows, base = results["environment"], results["rows"], results["baseline"]
    lines = [
        "# The swap of a large checkpoint",
        "",
        f"{results['bytes'] / 1e9:.1f} GB of random bf16 in shards of at most 5 GB, the shapes of {results['shape']}, "
        f"against `cp -r` of the same files; medians of {results['rounds']} rounds in turns, nothing of the source in "
        "the page cache at the start. Every swap looks at all values for NaN and infinity.",
        "",
        "| command | seconds | seconds until on disk | of cp's | peak RSS, MB | added | peak anonymous, MB | added |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        added = [(row[key] - base[key]) / 1e6 for key in ("peak", "anonymous")]
        cells = [f"{x:+.0f}" if name != "cp" else "" for x in added]
        lines.append(
            f"| `{name}` | {row['seconds']:.1f} | {row['on_disk']:.1f} | {row['ratio']:.2f} | "
            f"{row['peak'] / 1e6:.0f} | {cells[0]} | {row['anonymous'] / 1e6:.0f} | {cells[1]} |"
        )
    lines += [
        "",
        f"`added` is over the swap of a tiny model ({base['peak'] / 1e6:.0f} MB, {base['anonymous'] / 1e6:.0f} MB of "
        "it anonymous): Python, torch and transformers. `of cp's` is the larger of the ratios of both times.",
        "",
        f"Made by `{e['command']}` on {e['date']}, commit {e['commit']}"
        f"{' and uncommitted changes' if e['uncommitted'] else ''}: {e['cpu']}, {e['cores']} cores, "
        f"{e['memory'] / 1e9:.0f} GB of memory, Python {e['python']}, torch {e['torch']}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), help="8b, or 3b where the disk has no room for that")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="folder for the checkpoints; removed afterwards")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="bench-swap-", dir=options.work))
    try:
        shape = options.shape or ("8b" if shutil.disk_usage(work).free > 2 * 17 * 10**9 + KEPT_FREE else "3b")
        size = make_checkpoint(work / "model", shape)
        if shutil.disk_usage(work).free < size + KEPT_FREE:
            raise SystemExit(f"{work}: no room for a copy of {size / 1e9:.0f} GB; name another disk with --work")
        make_checkpoint(work / "tiny", "pico")
        tiny = [sys.executable, str(ROOT / "cli.py"), "swap", str(work / "tiny"), str(work / "small")]
        baseline = measure(tiny, work / "small")
        rows = measure_all(work, work / "model", options.rounds)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    for row in rows.values():
        row["ratio"] = max(row[key] / rows["cp"][key] for key in ("seconds", "on_disk"))
    results = {"environment": environment(), "shape": shape, "bytes": size, "rounds": options.rounds}
    results |= {"baseline": baseline, "rows": rows}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "swap.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (options.out / "swap.md").write_text(table(results), encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
