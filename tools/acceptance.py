"""Measure the acceptance lines and write docs/acceptance.json and docs/acceptance.md.

    python tools/acceptance.py                 every line (about an hour on 2 cores)
    python tools/acceptance.py exact op        some lines, by name; the others keep their last value

Runs in the project's environment (`make test` makes it). Nothing is copied from a log by hand: each line is
measured here, and its row says with which command.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tools.acceptance_by_layer
import tools.acceptance_data
import tools.acceptance_engines
import tools.acceptance_fidelity
import tools.acceptance_kernels
import tools.acceptance_models
import tools.acceptance_plan
import tools.acceptance_report
import tools.acceptance_serving
import tools.acceptance_swap
import tools.acceptance_training  # noqa: F401
from tools.acceptance_base import LINES, ROOT, line
from tools.acceptance_base import clone as _clone
from tools.acceptance_base import run as _run
from tools.readme import write_block

os.environ.setdefault("HF_HUB_OFFLINE", "1")
JSON, PAGE = ROOT / "docs" / "acceptance.json", ROOT / "docs" / "acceptance.md"
START, END = "<!-- measured -->", "<!-- /measured -->"
CLI = [sys.executable, str(ROOT / "cli.py")]


def pico_folders(root: Path) -> dict[str, Path]:
    """The tests' tiny random Llama, Qwen2 and Qwen3, tied and untied."""
    from transformers.utils import logging

    from tests.conftest import PICO_MODELS, make_pico

    logging.disable_progress_bar()
    return {name: make_pico(name, root / name) for name in PICO_MODELS}


def _student_differences(settings: dict[str, Any], length: int = 96) -> dict[str, float]:
    """Largest |logit difference| of student and teacher for every pico model, at once and with a cache."""
    import torch
    from transformers import AutoModelForCausalLM

    from nha_convert.convert import load_student
    from nha_convert.settings import NHASettings

    ids = torch.arange(2 * length).view(2, length) * 7 % 251
    worst = {}
    with tempfile.TemporaryDirectory() as root, torch.no_grad():
        for name, folder in pico_folders(Path(root)).items():
            teacher = AutoModelForCausalLM.from_pretrained(folder)
            student = load_student(folder, NHASettings(**settings))
            wanted = teacher(ids).logits
            worst[name] = (student(ids).logits - wanted).abs().max().item()
            first = student(ids[:, :41], use_cache=True)  # in pieces the op cannot take plain causal attention's path
            second = student(ids[:, 41:], past_key_values=first.past_key_values, use_cache=True)
            pieces = torch.cat((first.logits, second.logits), 1)
            worst[f"{name}, in two pieces"] = (pieces - wanted).abs().max().item()
    return worst


@line("exact", "swap, all windows full, fp32, pico Llama / Qwen2 / Qwen3", "logits equal bit for bit")
def exact() -> dict[str, Any]:
    worst = _student_differences({"window": "full"})
    at_once = {name: value for name, value in worst.items() if "pieces" not in name}
    text = f"largest difference {max(at_once.values()):.1g} over {len(at_once)} models"
    return {"measured": text, "met": not any(at_once.values()), "values": worst}


@line("op", "swap with window 4096 >= T: the op itself, fp32", "max abs logit difference <= 1e-5")
def op() -> dict[str, Any]:
    worst = _student_differences({"window": 4096, "slots": 8})
    return {"measured": f"{max(worst.values()):.2g}", "met": max(worst.values()) <= 1e-5, "values": worst}


@line(
    "kernels", "chunked path vs fp64 recurrence, odd T and W, z in -30 .. 15", "<= 1e-5 relative, forward and gradients"
)
def kernels() -> dict[str, Any]:
    import torch
    from nha_kernels.gates import log_decay_from_logits
    from nha_kernels.ops import nha_attention

    worst = {"forward": 0.0, "gradients": 0.0}
    cases = 0
    for time_, window in ((1, 0), (33, 0), (67, 5), (129, 17), (131, 64), (97, 33), (71, 200)):
        for tau in (1.0, 8.0):
            for low, high in ((-30.0, 15.0), (-30.0, -25.0), (10.0, 15.0), (-2.0, 2.0)):
                generator = torch.Generator().manual_seed(cases)

                def normal(*size: int, generator: torch.Generator = generator) -> torch.Tensor:
                    return torch.randn(*size, generator=generator, dtype=torch.float64)

                logits = low + (high - low) * torch.rand(2, time_, 2, 24, generator=generator, dtype=torch.float64)
                inputs = [normal(2, time_, 4, 16), normal(2, time_, 2, 16), normal(2, time_, 2, 16), logits]
                inputs += [1 + 0.3 * normal(4, 16), 0.3 * normal(4)]
                weight = normal(2, time_, 4, 16)
                results = []
                for dtype, backend in ((torch.float64, "reference"), (torch.float32, "torch")):
                    q, k, v, z, scale, bias = [x.detach().to(dtype, copy=True).requires_grad_() for x in inputs]
                    decay = log_decay_from_logits(z, tau)
                    if dtype == torch.float64:
                        decay = torch.nn.functional.logsigmoid(z).div(tau).clamp(min=-9.7040605)
                    options: dict[str, Any] = {"window": window, "sinks": 3, "slot_q_scale": scale, "slot_bias": bias}
                    out, _ = nha_attention(q, k, v, decay, backend=backend, **options)
                    (out * weight.to(dtype)).sum().backward()
                    grads = [x.grad for x in (q, k, v, z, scale, bias)]
                    results.append((out.detach().double(), [None if g is None else g.double() for g in grads]))
                (wanted, wanted_grads), (found, found_grads) = results
                worst["forward"] = max(worst["forward"], _relative(found, wanted))
                for ours, theirs in zip(found_grads, wanted_grads):
                    if theirs is not None and theirs.norm() > 1e-12:
                        worst["gradients"] = max(worst["gradients"], _relative(ours, theirs))
                cases += 1
    text = f"forward {worst['forward']:.2g}, gradients {worst['gradients']:.2g} ({cases} cases)"
    return {"measured": text, "met": max(worst.values()) <= 1e-5, "values": worst}


def _relative(found: Any, wanted: Any) -> float:
    """||found - wanted|| / ||wanted||"""
    return ((found - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()


@line("cached", "cached decode vs full forward, 4 W tokens past the window", "<= 1e-5")
def cached() -> dict[str, Any]:
    import torch

    from nha_convert.convert import load_student
    from nha_convert.settings import NHASettings

    window, worst = 16, {}
    ids = torch.arange(2 * 6 * window).view(2, -1) * 7 % 251
    with tempfile.TemporaryDirectory() as root, torch.no_grad():
        for name, folder in pico_folders(Path(root)).items():
            for full in ([], [1]):
                model = load_student(folder, NHASettings(window=window, slots=32, full_attention_layers=full))
                whole = model(ids, use_cache=False).logits
                out = model(ids[:, :window], use_cache=True)
                steps = [out.logits]
                for at in range(window, ids.shape[1]):
                    out = model(ids[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
                    steps.append(out.logits)
                worst[f"{name}/{len(full)} full"] = (torch.cat(steps, 1) - whole).abs().max().item()
    return {"measured": f"{max(worst.values()):.2g}", "met": max(worst.values()) <= 1e-5, "values": worst}


@line("teacher", "embedded teacher: 16 pairs over 512 tokens, exact match by generation", ">= 0.9, at most 16 MB")
def teacher() -> dict[str, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from nha_convert.data import recall_filler
    from nha_convert.evaluate.recall import recall_by_generation
    from nha_convert.recipe import embedded_teacher, load_recipe

    folder = embedded_teacher()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    filler = recall_filler(load_recipe("demo"), tokenizer)
    distances = [32 * i for i in range(3, 16)]
    cells = recall_by_generation(
        model, tokenizer, filler, distances=distances, pairs=16, prompts=32, span=512, quiet=True
    )
    values = {distance: cell["exact_match"] for distance, cell in cells.items()}
    mean = sum(values.values()) / len(values)
    size = (folder / "model.safetensors").stat().st_size / 2**20
    text = f"{mean:.3f} (mean over distances 96 to 480), {size:.1f} MB, vocabulary {len(tokenizer)}"
    return {"measured": text, "met": mean >= 0.9 and size <= 16 and len(tokenizer) <= 4096, "values": values}


@line(
    "demo",
    "`make demo` in a clean clone, 2 cores, no GPU, environment installed",
    "<= 12 minutes, exit 0, export and report",
)
def demo() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as root:
        clone = _clone(Path(root))
        _run(["make", "-s", ".venv/installed"], clone)
        started = time.time()
        _run(["make", "demo"], clone)
        minutes = (time.time() - started) / 60
        there = all((clone / "runs" / "demo" / name).exists() for name in ("export/model.safetensors", "report.html"))
        keep = ROOT / "runs" / "acceptance" / "demo"
        shutil.rmtree(keep, ignore_errors=True)
        shutil.copytree(clone / "runs" / "demo", keep)
    return {"measured": f"{minutes:.1f} minutes, exit 0", "met": minutes <= 12 and there, "minutes": minutes}


@line(
    "fidelity", "demo: one layer full, M = 64, W = 64", "NLL within 2 % of the teacher; recall >= 0.9 of its at >= 2 W"
)
def fidelity() -> dict[str, Any]:
    evaluation = json.loads((ROOT / "runs" / "acceptance" / "demo" / "eval.json").read_text(encoding="utf-8"))
    write_readme(evaluation)
    teacher_row, final = evaluation["teacher"], evaluation["final"]
    excess = 100 * (final["nll"] / teacher_row["nll"] - 1)
    recall = {
        distance: (cell["exact_match"], teacher_row["recall"][distance]["exact_match"])
        for distance, cell in final["recall"].items()
    }
    share = {distance: ours / theirs for distance, (ours, theirs) in recall.items()}
    text = f"NLL {excess:+.2f} %; recall / teacher's " + ", ".join(f"{d}: {s:.2f}" for d, s in share.items())
    met = excess <= 2 and min(share.values()) >= 0.9
    return {"measured": text, "met": met, "values": {"nll_percent": excess, "recall": recall}}


@line("align", "all layers NHA, align alone (<= 1M tokens), W = 32: memory recovery", ">= 0.6")
def align() -> dict[str, Any]:
    out = ROOT / "runs" / "acceptance" / "align-only"
    shutil.rmtree(out, ignore_errors=True)
    _run([*CLI, "run", "align-only", "--out", str(out), "--quiet"], ROOT)
    evaluation = json.loads((out / "eval.json").read_text(encoding="utf-8"))
    done = json.loads(next((out / "stages").glob("*/done.json")).read_text(encoding="utf-8"))
    recovery, tokens = evaluation["memory_recovery"]["final"], done["tokens"]
    text = f"{recovery:.3f} after {tokens:,} tokens (swapped: {evaluation['memory_recovery']['swapped']:.2f})"
    return {"measured": text, "met": recovery >= 0.6 and tokens <= 1_000_000}


@line(
    "clean", "export in an environment with only torch, transformers, safetensors", "the run's logits; generate works"
)
def clean() -> dict[str, Any]:
    run = ROOT / "runs" / "acceptance" / "demo"
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    wanted = [pin for pin in pins if pin.split("==")[0] in ("torch", "transformers", "safetensors")]
    with tempfile.TemporaryDirectory() as root:
        python = str(Path(root, "venv", "bin", "python"))
        _run([sys.executable, "-m", "venv", str(Path(root, "venv"))], ROOT)
        _run([python, "-m", "pip", "install", "-q", *sorted(wanted)], ROOT)
        program = (
            "import sys, torch\nfrom safetensors.torch import load_file\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
            "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()\n"
            "check = load_file(sys.argv[2])\n"
            "with torch.no_grad():\n    logits = model(check['input_ids']).logits\n"
            "print((logits - check['logits']).abs().max().item())\n"
            "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
            "ids = tokenizer('import os', return_tensors='pt')\n"
            "out = model.generate(**ids, max_new_tokens=100, min_new_tokens=100)\n"
            "print(out.shape[1] - ids['input_ids'].shape[1])\n"
        )
        env = {"HF_MODULES_CACHE": str(Path(root, "modules")), "HF_HOME": str(Path(root, "home"))}
        command = [python, "-c", program, str(run / "export"), str(run / "export_check.safetensors")]
        difference, generated = _run(command, Path(root), env).stdout.split()[-2:]
    text = f"max logit difference {float(difference):.2g}; {generated} tokens generated"
    return {"measured": text, "met": float(difference) <= 1e-5 and generated == "100"}


@line("resume", "demo killed (-9) in each stage, then resumed", "final weights bit-identical to an uninterrupted run")
def resume() -> dict[str, Any]:
    whole = ROOT / "runs" / "acceptance" / "demo"
    out = ROOT / "runs" / "acceptance" / "killed"
    shutil.rmtree(out, ignore_errors=True)
    kills = []
    for stage, steps in (("01-", 40), ("02-", 30)):
        process = subprocess.Popen([*CLI, "run", "demo", "--out", str(out), "--resume", "--quiet"], cwd=ROOT)
        while process.poll() is None and _steps(out, stage) < steps:
            time.sleep(0.2)
        if process.poll() is not None:
            return {"measured": f"the run ended before stage {stage} could be killed", "met": False}
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills.append(f"stage {int(stage[:2])} at step {_steps(out, stage)}")
    _run([*CLI, "run", "demo", "--out", str(out), "--resume", "--quiet"], ROOT)
    same = (out / "export" / "model.safetensors").read_bytes() == (whole / "export" / "model.safetensors").read_bytes()
    return {"measured": f"{'identical' if same else 'different'} bytes after kills in {', '.join(kills)}", "met": same}


def _steps(out: Path, stage: str) -> int:
    """The last logged step of a stage, 0 before its first."""
    path = out / "metrics.jsonl"
    if not path.exists():
        return 0
    rows = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines() if text.endswith("}")]
    return max((row["step"] for row in rows if str(row["stage"]).startswith(stage)), default=0)


@line("errors", "bad input: 7 kinds", "exit 2, one clear line each with the fix, nothing written")
def errors() -> dict[str, Any]:
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        cases = _bad_input(folder)
        for name, arguments in cases.items():
            before = sorted(path for path in folder.rglob("*"))
            done = subprocess.run([*CLI, *arguments], capture_output=True, text=True, cwd=folder)
            after = sorted(path for path in folder.rglob("*"))
            lines = [text for text in done.stderr.splitlines() if text.strip()]
            ok = done.returncode == 2 and "Traceback" not in done.stderr and before == after and len(lines) == 1
            results[name] = {"ok": ok, "exit": done.returncode, "stderr": done.stderr.strip().replace(root, "")}
    good = sum(row["ok"] for row in results.values())
    return {"measured": f"{good} of {len(results)}", "met": good == len(results), "values": results}


def _bad_input(folder: Path) -> dict[str, list[str]]:
    """Name -> arguments of a command that must be refused."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from nha_convert.recipe import embedded_teacher

    recipe = folder / "typo.yaml"
    recipe.write_text(
        "model: embedded\noutput: runs/x\nnah: {slots: 64}\ndata: {sources: [{source: stdlib}]}\nstages: []\n"
    )
    torn = folder / "torn"
    shutil.copytree(embedded_teacher(), torn)
    weights = torn / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=64)).save_pretrained(folder / "gpt2")
    (folder / "full").mkdir()
    (folder / "full" / "file").write_text("mine")
    out = folder / "out"
    return {
        "unknown recipe key": ["run", str(recipe), "--out", str(out)],
        "missing model folder": ["swap", str(folder / "nothing"), str(out)],
        "truncated safetensors": ["swap", str(torn), str(out)],
        "a GPT-2 model": ["swap", str(folder / "gpt2"), str(out)],
        "window = -1": ["run", "demo", "--out", str(out), "--set", "nha.window=-1"],
        "slots = 0": ["run", "demo", "--out", str(out), "--set", "nha.slots=0"],
        "output not empty": ["run", "demo", "--out", str(folder / "full")],
    }


@line("tests", "`make test` in a clean clone, 2 cores, environment installed", "green in <= 15 minutes")
def tests() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as root:
        clone = _clone(Path(root))
        _run(["make", "-s", ".venv/installed"], clone)
        started = time.time()
        done = _run(["make", "test"], clone)
        minutes = (time.time() - started) / 60
    summary = done.stdout.strip().splitlines()[-1].strip("= ")
    return {"measured": f"{minutes:.1f} minutes; {summary}", "met": minutes <= 15, "minutes": minutes}


def write_page(rows: dict[str, Any]) -> None:
    """The table of docs/acceptance.md between its markers; the prose around it is ours to write."""
    text = PAGE.read_text(encoding="utf-8")
    table = ["| line | target | measured | met | command |", "|---|---|---|---|---|"]
    for name in LINES:
        if name in rows:
            row = rows[name]
            met = "yes" if row["met"] else "**no**"
            table.append(f"| {row['what']} | {row['target']} | {row['measured']} | {met} | `{row['command']}` |")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{START}\n" + "\n".join(table) + f"\n{END}{after}", encoding="utf-8")


def write_readme(evaluation: dict[str, Any]) -> None:
    """README's table of the demo."""
    from nha_convert.evaluate.table import table_header, table_notes, table_rows

    rows = [cells for _, cells in table_rows(evaluation)]
    note = f"{' '.join(table_notes(evaluation))}\nWritten by `python tools/acceptance.py fidelity`."
    write_block("demo-table", table_header(evaluation), rows, note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", nargs="*", choices=[[], *LINES], metavar="LINE", help=", ".join(LINES))
    chosen = parser.parse_args().lines or list(LINES)
    rows = json.loads(JSON.read_text(encoding="utf-8")) if JSON.exists() else {}
    for name in chosen:
        what, target, measure = LINES[name]
        row = measure()
        commit = _run(["git", "rev-parse", "--short", "HEAD"], ROOT).stdout.strip()
        rows[name] = {
            "what": what,
            "target": target,
            **row,
            "command": f"python tools/acceptance.py {name}",
            "commit": commit,
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
            "date": time.strftime("%Y-%m-%d"),
        }
        print(f"{name}: {row['measured']} ({'met' if row['met'] else 'NOT met'})", flush=True)
        JSON.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        write_page(rows)
    if not all(rows[name]["met"] for name in chosen):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
