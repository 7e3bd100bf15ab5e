"""What so many exact tokens per head would recall, chosen by what is asked for later, into docs/studies/capacity.*

    python tools/study_capacity.py            both teachers, windows of 32 and 64 (15 minutes on one core)
    python tools/study_capacity.py --table    only writes the table of what was measured

Nothing is trained. In every layer a query sees its window and, of all that has left it, the tokens that full attention
in this layer will give most to from there on: as many as an NHA layer has slots, with their exact keys, values and
positions. No memory can know that; what it would recover is a yardstick for what slots do recover (memory.md).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
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
from torch import Tensor  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402
from transformers.utils import logging  # noqa: E402

from nha_convert.convert import load_student  # noqa: E402
from nha_convert.data import held_out_tokens  # noqa: E402
from nha_convert.files import write_json, write_text  # noqa: E402
from nha_convert.model_source import resolve_model  # noqa: E402
from nha_convert.modeling import attention_nha  # noqa: E402
from nha_convert.recipe import Recipe  # noqa: E402
from tools.study_memory import PROTOCOLS, TEACHERS, study_recipe  # noqa: E402
from tools.study_slot_reads import recovery  # noqa: E402

OUT = ROOT / "docs" / "studies" / "capacity"
WINDOWS = (32, 64)
KEPT = (16, 32, 64, 128, 256)


def visible(attention: Tensor, window: int, kept: int) -> Tensor:
    """Which tokens a query may see: its window, and the tokens beyond it that are asked for most from there on.

    Each query chooses anew among all: what one leaves out, a later one may have.

    Args:
        attention: [B, G, T, T], what each query gives each token, summed over the heads of a key's head.
        window: exact tokens, the query's own among them.
        kept: tokens beyond it.
    Returns:
        bool [B, G, T, T].
    """
    place = torch.arange(attention.shape[-1], device=attention.device)
    age = place[:, None] - place
    far = age >= window
    given = attention * far
    later = given.flip(2).cumsum(2).flip(2).masked_fill(~far, 0)  # from this query on
    least = later.topk(min(kept, later.shape[-1]), -1).values[..., -1:]
    return (~far & (age >= 0)) | ((later >= least) & (later > 0))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int,
    kept: int,
    cos: Tensor,
    sin: Tensor,
    scale: float,
) -> Tensor:
    """Softmax attention over what is `visible`.

    Args:
        query: [B, T, H, D]; key, value: [B, T, G, D]; cos, sin: [B or 1, T, rotary_dim].
    Returns:
        [B, T, H, D].
    """
    groups = key.shape[2]
    turn = cos[:, :, None], sin[:, :, None]
    asking = rotate(query, *turn).unflatten(2, (groups, -1))  # [B,T,G,R,D]
    scores = torch.einsum("btgrd,bjgd->bgrtj", asking, rotate(key, *turn)) * scale
    ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    whole = scores.masked_fill(ahead, -torch.inf).softmax(-1).sum(2)  # [B,G,T,T]
    shares = scores.masked_fill(~visible(whole, window, kept)[:, :, None], -torch.inf).softmax(-1)
    return torch.einsum("bgrtj,bjgd->btgrd", shares, value).flatten(2, 3)


@contextmanager
def keeping(kept: int) -> Iterator[None]:
    """Inside, layers of models keep so many exact tokens in place of slots."""

    def instead(
        query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, *, branch: str = "both", **options: Any
    ) -> tuple[Tensor, None]:
        if branch != "both":
            output, *_ = nha_attention(query, key, value, log_decay, branch=branch, **options)
            return output, None
        assert not options["sinks"]
        assert all(options.get(name) is None for name in ("padding_mask", "cu_seqlens", "initial_state"))
        wanted = {name: options[name] for name in ("window", "cos", "sin", "scale")}
        return attend(query, key, value, kept=kept, **wanted), None

    with patch.object(attention_nha, "nha_attention", instead):
        yield


def measured(teacher: str, window: int) -> list[dict[str, Any]]:
    """A row for each number of kept tokens, on the text of the study of memory."""
    recipe = Recipe.model_validate(study_recipe(teacher, str(window), PROTOCOLS["long"], 0))
    folder = resolve_model(recipe.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = load_student(folder, recipe.nha.model_copy(update={"gate_init": "zero"}), dtype=torch.float32)
    text = held_out_tokens(recipe, tokenizer)
    rows = []
    for kept in KEPT:
        with keeping(kept):
            found = recovery(model, text, recipe.evaluate.sequence_length, tokenizer.bos_token_id)
        row: dict[str, Any] = {"teacher": teacher, "window": window, "kept": kept, "recovery": found["recovery"]}
        rows.append(row | {"nll": {"kept": found["both"], "teacher": found["teacher"], "window": found["window"]}})
        print(f"{teacher}, W {window}, {kept} kept: {found['recovery']:.3f}", flush=True)
    return rows


def page(rows: list[dict[str, Any]]) -> str:
    """docs/studies/capacity.md."""
    lines = [
        "# What as many exact tokens would recall",
        "",
        "Written by `python tools/study_capacity.py`; nothing is trained, nothing random. In every layer and "
        "key/value head a query sees its window and, of all tokens that have left it, those that full attention "
        "in this layer gives most to from there on, with exact keys, values and positions. The choice knows what "
        "will be asked and is made anew for each query, which no eviction can. Slots may still do better: they "
        "merge tokens, and the model learns to ask them. So this is a yardstick, not a bound. There are no sinks. "
        "Text, rows and teachers are those of [memory.md](memory.md).",
        "",
        f"| teacher | window | {' | '.join(f'{kept} kept' for kept in KEPT)} |",
        "|---" * (len(KEPT) + 2) + "|",
    ]
    for place in dict.fromkeys((row["teacher"], row["window"]) for row in rows):
        found = {row["kept"]: row["recovery"] for row in rows if (row["teacher"], row["window"]) == place}
        cells = [place[0], str(place[1]), *(f"{found[kept]:.3f}" for kept in KEPT)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Memory recovery: 1 is the teacher, 0 the window alone."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="measure nothing")
    options = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    path = OUT.with_suffix(".json")
    if not options.table:
        with torch.no_grad():
            write_json(path, [row for teacher in TEACHERS for window in WINDOWS for row in measured(teacher, window)])
    write_text(OUT.with_suffix(".md"), page(json.loads(path.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
