"""Other ways for queries to meet slots, before anybody builds them: prototypes, into docs/studies/slot-reads.*

    python tools/study_slot_reads.py --work DIR                       all of them, seed 0 (an hour on one core)
    python tools/study_slot_reads.py --work DIR --only "bias per slot"
    python tools/study_slot_reads.py                                  only writes the table of what was measured

The layer of this package has a query scale per channel and a bias per head. Here the slots are read by plain PyTorch
with a bias per slot, a full matrix per head in place of the scale, or some slots whose keys keep RoPE. The recipe is
that of `tools/study_training.py`, alignment alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch  # noqa: E402
from nha_kernels.ops import nha_attention  # noqa: E402
from nha_kernels.rotary import rotate  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402
from transformers.utils import logging  # noqa: E402

from nha_convert.convert import load_student  # noqa: E402
from nha_convert.data import held_out_tokens  # noqa: E402
from nha_convert.evaluate.ablation import branch_reader, memory_recovery  # noqa: E402
from nha_convert.evaluate.nll import compare, evaluating, teacher_logits_of  # noqa: E402
from nha_convert.files import write_json, write_text  # noqa: E402
from nha_convert.gate_inputs import calibrate_gates, calibration_ids  # noqa: E402
from nha_convert.model_source import resolve_model  # noqa: E402
from nha_convert.modeling import attention_nha  # noqa: E402
from nha_convert.modeling.attention_nha import nha_layers  # noqa: E402
from nha_convert.train import run_stage  # noqa: E402
from tools.study_training import ALIGN, PAPERS, kept, study_recipe  # noqa: E402

OUT = ROOT / "docs" / "studies" / "slot-reads"
CHUNK = 64
ROTATED = 8
"""Every so many slots one keeps RoPE."""


def slot_states(absorbed: Tensor, log_decay: Tensor) -> Tensor:
    """The slots after every token.

    Args:
        absorbed: [B, T, G, M or 1, D], what is folded in at each step.
        log_decay: [B, T, G, M]; 0 folds nothing in.
    Returns:
        [B, T, G, M, D].
    """
    state = absorbed.new_zeros(*absorbed.shape[:1], *log_decay.shape[2:], absorbed.shape[-1])
    parts = []
    for start in range(0, absorbed.shape[1], CHUNK):
        decay = log_decay[:, start : start + CHUNK]
        total = decay.cumsum(1)  # [B,L,G,M]
        apart = total[:, :, None] - total[:, None]  # [B,L,J,G,M]
        later = torch.ones(apart.shape[1:3], dtype=torch.bool, device=apart.device).triu(1)
        weight = apart.masked_fill(later[..., None, None], -torch.inf).exp() * -decay.expm1()[:, None]
        tokens = absorbed[:, start : start + CHUNK].expand(*decay.shape, -1)
        inside = torch.einsum("bljgm,bjgmd->blgmd", weight, tokens)
        parts.append(inside + total.exp()[..., None] * state[:, None])
        state = parts[-1][:, -1]
    return torch.cat(parts, 1)


def read_slots(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    *,
    window: int,
    sinks: int,
    slot_q_scale: Tensor,
    slot_bias: Tensor,
    rotated: Tensor,
    cos: Tensor,
    sin: Tensor,
    scale: float,
    mask_empty: bool,
    branch: str = "both",
    **options: Any,
) -> tuple[Tensor, None]:
    """As `nha_attention` without caches, padding and packing, with other ways to read.

    Args:
        slot_q_scale: [H, D], or [H, D, D] matrices; slot_bias: [H], or [H, M].
        rotated: bool [M], slots whose keys keep RoPE and that queries meet rotated.
    """
    assert options.get("padding_mask") is None and options.get("cu_seqlens") is None
    common: dict[str, Any] = {"window": window, "sinks": sinks, "cos": cos, "sin": sin, "scale": scale}
    common |= {"mask_empty": mask_empty}
    exact, lse, _ = nha_attention(query, key, value, log_decay, branch="window", return_lse=True, **common)
    if branch == "window":
        return exact, None
    time_, groups = query.shape[1], key.shape[2]
    heads = query.shape[2] // groups
    leaving = torch.arange(time_) - window  # the token that is folded in at each step
    takes = leaving >= sinks
    taken = leaving.clamp_min(0)
    decay = log_decay[:, taken] * takes[None, :, None, None]
    turn = cos[:, :, None], sin[:, :, None]
    keys = torch.where(rotated[:, None], rotate(key, *turn)[:, :, :, None], key[:, :, :, None])  # [B,T,G,M,D]
    slot_k, slot_v = slot_states(keys[:, taken], decay), slot_states(value[:, taken, :, None], decay)
    if slot_q_scale.dim() == 2:
        plain = query * slot_q_scale
    else:
        plain = torch.einsum("bthd,hde->bthe", query, slot_q_scale)
    asking = [x.unflatten(2, (groups, heads)) for x in (plain, rotate(query, *turn))]  # [B,T,G,R,D]
    by_content, by_place = (torch.einsum("btgrd,btgmd->btgrm", x, slot_k) * scale for x in asking)
    scores = torch.where(rotated, by_place, by_content).flatten(2, 3)  # [B,T,H,M]
    scores = scores + (slot_bias[:, None] if slot_bias.dim() == 1 else slot_bias)
    if mask_empty:
        scores = scores.masked_fill(~(takes.cumsum(0) > 0)[None, :, None, None], -torch.inf)
    both = scores if branch == "slots" else torch.cat((scores, lse[..., None]), -1)
    shares = torch.nan_to_num(both.softmax(-1))
    grouped = shares[..., : scores.shape[-1]].unflatten(2, (groups, heads))
    output = torch.einsum("btgrm,btgmd->btgrd", grouped, slot_v).flatten(2, 3)
    return (output if branch == "slots" else output + shares[..., -1:] * exact), None


# ---- variants -----------------------------------------------------------------------------------------
def per_slot(gate: Any) -> None:
    """A bias for every slot of every head."""
    gate.slot_bias = nn.Parameter(gate.slot_bias.detach()[:, None].repeat(1, gate.slots))


def matrices(gate: Any) -> None:
    """A full matrix per head, which starts as the scale."""
    gate.slot_q_scale = nn.Parameter(torch.diag_embed(gate.slot_q_scale.detach()))


VARIANTS: dict[str, tuple[Callable[[Any], None] | None, bool]] = {
    "the package's layer": (None, False),
    "bias per slot": (per_slot, False),
    "full matrices": (matrices, False),
    f"one slot in {ROTATED} rotated": (None, True),
}
"""What becomes of a layer's gate, and whether some slots keep RoPE."""


@contextmanager
def reading(rotated: bool, slots: int) -> Iterator[None]:
    """Inside, the layers of models read their slots by `read_slots`."""
    place = (torch.arange(slots) % ROTATED == 0) & rotated

    def attend(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, **options: Any) -> tuple[Tensor, None]:
        return read_slots(query, key, value, log_decay, rotated=place, **options)

    with patch.object(attention_nha, "nha_attention", attend):
        yield


def measured(name: str, seed: int, work: Path) -> dict[str, Any]:
    """One variant, trained and measured."""
    change, rotated = VARIANTS[name]
    recipe = study_recipe(({}, [ALIGN]), seed)
    folder = resolve_model(recipe.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = load_student(folder, recipe.nha, dtype=torch.float32, seed=seed, length=recipe.training_length)
    calibrate_gates(model, recipe.nha, calibration_ids(recipe, tokenizer), seed=seed)
    for _, layer in nha_layers(model):
        if change is not None:
            change(layer.nha)
    text = held_out_tokens(study_recipe(({}, [ALIGN]), 0), tokenizer)  # the same for all seeds
    run_dir = work / f"{name.replace(' ', '-')}-{seed}"
    shutil.rmtree(run_dir, ignore_errors=True)
    run_dir.mkdir(parents=True)
    row: dict[str, Any] = {"variant": name, "seed": seed}
    with reading(rotated, model.config.slots_of(0)):
        row["started"] = recovery(model, text, recipe.evaluate.sequence_length, tokenizer.bos_token_id)
        model, _ = run_stage(model, tokenizer, recipe, 0, run_dir, resume=False, quiet=True)
        row["aligned"] = recovery(model, text, recipe.evaluate.sequence_length, tokenizer.bos_token_id)
    shutil.rmtree(run_dir)
    return row


def recovery(model: Any, text: Tensor, length: int, bos: int | None) -> dict[str, float]:
    """NLL with and without slots, and memory recovery."""
    readers = {"teacher": teacher_logits_of(model, None)}
    readers |= {branch: branch_reader(model, branch) for branch in ("both", "window")}
    with evaluating(model):
        found = compare(readers, text, length, batch_size=2, bos=bos, quiet=True, description="recovery")
    nll = {name: found[name]["nll"]["mean"] for name in readers}
    return {**nll, "recovery": memory_recovery(nll["both"], nll["teacher"], nll["window"])}


# ---- the page -----------------------------------------------------------------------------------------
def page(rows: list[dict[str, Any]], papers: list[dict[str, Any]], before: str) -> str:
    """docs/studies/slot-reads.md: what a person wrote, then the table.

    Args:
        papers: rows of the study of training, of the paper's layer.
    """
    lines = ["| the slots are read with | seed | recovery: started | aligned | NLL |", "|---" * 5 + "|"]
    for row in sorted(rows, key=lambda row: (list(VARIANTS).index(row["variant"]), row["seed"])):
        cells = [row["variant"], str(row["seed"]), f"{row['started']['recovery']:.3f}"]
        cells += [f"{row['aligned']['recovery']:.3f}", f"{row['aligned']['both']:.4f}"]
        lines.append(f"| {' | '.join(cells)} |")
    for row in papers:
        cells = [row["variant"], str(row["seed"]), "–", f"{row['recovery']:.3f}", f"{row['nll']:.4f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return before + "<!-- table: written by tools/study_slot_reads.py -->\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="where runs lie while they train; left out, nothing is run")
    parser.add_argument("--only", nargs="*", choices=list(VARIANTS), help="names of variants")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.disable_progress_bar()
    path, page_path = OUT.with_suffix(".json"), OUT.with_suffix(".md")
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    for name in options.only or VARIANTS if options.work else ():
        if not any((row["variant"], row["seed"]) == (name, options.seed) for row in rows):
            row = measured(name, options.seed, options.work)
            rows.append(row)
            write_json(path, rows)
            print(f"{name}: {row['started']['recovery']:.3f} -> {row['aligned']['recovery']:.3f}", flush=True)
    text = page_path.read_text(encoding="utf-8") if page_path.exists() else "# Other ways to read the slots\n\n"
    papers = [row for row in kept() if row["variant"] in PAPERS and row["teacher"] == "embedded"]
    write_text(page_path, page(rows, papers, text.partition("<!-- table:")[0]))


if __name__ == "__main__":
    main()
