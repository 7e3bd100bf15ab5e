"""Train a small teacher that recalls, from nothing but this machine's Python.

    python tools/teacher/train.py --out recipes/teacher

makes the embedded Llama; it needs 2 CPU cores and about an hour. Another architecture, size or seed:

    python tools/teacher/train.py --architecture qwen3 --seed 1 --budget tokens --out runs/qwen3 --state runs/kept

Two phases, because recall appears as a phase transition that mixed data alone does not bring in reach: first the
circuit (short sequences of one-token keys and values, a curriculum from 2 to 32 pairs), then standard-library text
mixed with recall documents in growing context. With `--budget tokens` the steps are the same on every machine with the
same standard library and tokenizer; with `--budget minutes` a faster machine trains longer.

The run is kept in --state once a minute: the same command goes on where it was saved. At the end --out gets the model,
its tokenizer and the log. How long the embedded teacher trained is in its log: one stage was stopped by hand, and notes
stand where that happened.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from transformers import AutoTokenizer

from nha_convert.corpus import stdlib_texts
from nha_convert.errors import InputError, WorkError
from nha_convert.recall_documents import RecallGenerator
from tools.teacher.run_state import LOG, RunState
from tools.teacher.sizes import CLASSES, CONTEXT, SIZES, TeacherSize, new_teacher
from tools.teacher.stages import Sources, teacher_stages
from tools.teacher.tokenizer import train_tokenizer
from tools.teacher.training import TeacherTraining


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; sizes left out are None."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("recipes/teacher"), help="written when all stages are done")
    parser.add_argument("--state", type=Path, default=Path("runs/teacher"), help="where the run is kept")
    parser.add_argument("--save-every", type=float, default=60, help="seconds between two saves")
    parser.add_argument("--architecture", choices=sorted(CLASSES), default="llama")
    for field in fields(TeacherSize):
        presets = ", ".join(f"{name} {getattr(size, field.name)}" for name, size in SIZES.items())
        parser.add_argument("--" + field.name.replace("_", "-"), type=int, help=f"left out: {presets}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer's folder; left out, one is trained")
    parser.add_argument("--budget", choices=("minutes", "tokens"), default="minutes", help="what ends a stage")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the budgets of all stages")
    parser.add_argument("--circuit-minutes", type=float, default=20, help="the circuit phase's limit")
    args = parser.parse_args(arguments)
    for name in ("learning_rate", "scale", "circuit_minutes", "save_every"):
        if not getattr(args, name) > 0:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(args, name)}; give a number above 0")
    return args


def teacher_size(args: argparse.Namespace) -> TeacherSize:
    """The architecture's size with the dimensions given instead.

    Raises:
        InputError: the dimensions fit no model.
    """
    given = {field.name: getattr(args, field.name) for field in fields(TeacherSize)}
    size = replace(SIZES[args.architecture], **{name: value for name, value in given.items() if value is not None})
    size.check()
    return size


def load_tokenizer(folder: Path | None) -> Any:
    """The tokenizer of `folder`, or one trained on this machine's standard library.

    Raises:
        InputError: the folder holds none, or its special tokens are others than the teachers'.
    """
    if folder is None:
        return train_tokenizer(length=CONTEXT)
    if not (folder / "tokenizer.json").is_file():
        raise InputError(f"--tokenizer {folder} has no tokenizer.json; give the folder of a teacher")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    if ids != (0, 1, 2):
        raise InputError(f"--tokenizer {folder} has BOS, EOS and padding ids {ids}; a teacher's are (0, 1, 2)")
    return tokenizer


def token_ids(tokenizer: Any, split: str) -> list[int]:
    """All ids of one split of the standard library, file after file."""
    return [
        i for page in stdlib_texts(split) for i in tokenizer(page, add_special_tokens=False, verbose=False)["input_ids"]
    ]


def train(args: argparse.Namespace) -> None:
    """Trains, or goes on with, the teacher that the options describe, and writes it to `args.out`."""
    size = teacher_size(args)
    tokenizer = load_tokenizer(args.tokenizer)
    text = token_ids(tokenizer, "train")
    settings = {
        "architecture": args.architecture,
        **asdict(size),
        "seed": args.seed,
        "learning_rate": args.learning_rate,
        "budget": args.budget,
        "corpus": hashlib.sha256(" ".join(map(str, text)).encode()).hexdigest()[:16],
    }
    state = RunState(args.state, settings)
    model = new_teacher(args.architecture, size, len(tokenizer), args.seed)
    sources = Sources(text, RecallGenerator(tokenizer, text, seed=args.seed + 1), random.Random(args.seed))
    training = TeacherTraining(
        model,
        teacher_stages(args.scale, args.circuit_minutes),
        sources,
        state,
        bound=args.budget,
        learning_rate=args.learning_rate,
        save_every=args.save_every,
    )
    training.run(tokenizer, token_ids(tokenizer, "held_out"))
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    shutil.copyfile(args.state / LOG, args.out / LOG)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; 0, 2 where the input is wrong, 1 where the work failed."""
    try:
        train(parse(arguments))
    except (InputError, WorkError) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
