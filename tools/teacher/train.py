"""Train the embedded teacher: a small Llama that recalls, from nothing but this machine's Python.

    python tools/teacher/train.py --out recipes/teacher

Needs 2 CPU cores and about an hour. Two phases, because recall appears as a phase transition that mixed data
alone does not bring in reach: first the circuit (short sequences of one-token keys and values, a curriculum
from 2 to 32 pairs), then standard-library text mixed with recall documents in growing context. Writes the model,
its tokenizer and `training.jsonl`; finished stages are kept in --state and not run again. How long the shipped
teacher trained is in its log: one stage was stopped by hand, and notes stand where that happened.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from nha_convert.corpus import stdlib_texts
from nha_convert.recall_documents import RecallGenerator
from tools.teacher.tokenizer import train_tokenizer

Log = Callable[..., None]
IGNORE = -100


class TextStage(NamedTuple):
    """One stage of the text phase; the learning rate falls to 0 over a stage that decays, else it is constant."""

    minutes: float
    context: int
    batch: int
    recall_share: float
    max_pairs: int
    decays: bool


STAGES = (
    TextStage(minutes=12, context=256, batch=16, recall_share=0.5, max_pairs=16, decays=False),
    TextStage(minutes=16, context=512, batch=8, recall_share=0.5, max_pairs=32, decays=False),
    TextStage(minutes=18, context=1280, batch=4, recall_share=0.4, max_pairs=32, decays=True),
)
CURRICULUM = ((2, 8), (4, 16), (8, 64), (16, 10**6), (32, 10**6))  # pairs, vocabulary


def teacher_config(vocab_size: int) -> LlamaConfig:
    """3.4 M parameters; untied embeddings and a wide initialisation, without which recall was lost."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1280,
        initializer_range=0.06,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )


def circuit_batch(rng: random.Random, words: list[int], pairs: int, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values in pairs, then all keys again in another order; labels only on the second values."""
    inputs, labels = [], []
    for _ in range(batch):
        keys = rng.sample(words, pairs)
        table = {key: rng.choice(words) for key in keys}
        asked = rng.sample(keys, pairs)
        ids = [0] + [token for key in keys for token in (key, table[key])]
        targets = [IGNORE] * len(ids)
        for key in asked:
            ids += [key, table[key]]
            targets += [IGNORE, table[key]]
        inputs.append(ids)
        labels.append(targets)
    return torch.tensor(inputs), torch.tensor(labels)


def losses(model: Any, input_ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Mean cross entropy where labels stand, and the share of them predicted first."""
    logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1].float()  # [B,T-1,V]
    targets = labels[:, 1:]
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
    asked = targets != IGNORE
    accuracy = (logits.argmax(-1)[asked] == targets[asked]).float().mean().item()
    return loss, accuracy


def train_circuit(
    model: Any, words: list[int], rng: random.Random, seconds: float, log: Log, learning_rate: float = 1e-3
) -> None:
    """Recall on bare pairs, a level up whenever 0.9 of the answers are right."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    level, average, start, step = 0, 0.0, time.time(), 0
    while level < len(CURRICULUM) and time.time() - start < seconds:
        pairs, size = CURRICULUM[level]
        pool = words if size >= len(words) else words[:size]
        input_ids, labels = circuit_batch(rng, pool, pairs, max(8, min(64, 512 // pairs)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / 100)
        loss, accuracy = losses(model, input_ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average = 0.95 * average + 0.05 * accuracy
        step += 1
        if step % 100 == 0 or average > 0.9:
            log(phase="circuit", step=step, pairs=pairs, vocabulary=len(pool), loss=loss.item(), accuracy=average)
        if average > 0.9:
            level, average = level + 1, 0.0


def mixed_batch(
    rng: random.Random, text: list[int], generator: RecallGenerator, stage: TextStage
) -> tuple[torch.Tensor, torch.Tensor]:
    """Text windows and recall documents side by side: ids, and a mask of the answers."""
    rows, answers = [], []
    for _ in range(stage.batch):
        mask = [False] * (stage.context + 1)
        if rng.random() < stage.recall_share:
            document = generator.document(stage.context, max_pairs=stage.max_pairs)
            ids = [0] + document.input_ids
            for begin, end in document.answers:
                mask[begin + 1 : end + 1] = [True] * (end - begin)
        else:
            begin = rng.randrange(len(text) - stage.context)
            ids = [0] + text[begin : begin + stage.context]
        rows.append(ids)
        answers.append(mask)
    return torch.tensor(rows), torch.tensor(answers)


def train_text(
    model: Any,
    text: list[int],
    generator: RecallGenerator,
    rng: random.Random,
    stage: TextStage,
    log: Log,
    learning_rate: float = 1e-3,
) -> None:
    """Text and recall documents of one context length; the answers count as much again as all tokens."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    start, step, tokens = time.time(), 0, 0
    running: dict[str, float] = {}
    while (share := (time.time() - start) / (60 * stage.minutes)) < 1.0:
        factor = min(1.0, (step + 1) / 100) * (1 - share if stage.decays else 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * factor
        input_ids, answers = mixed_batch(rng, text, generator, stage)
        logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
        targets, asked = input_ids[:, 1:], answers[:, 1:]
        nll = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view_as(targets)
        loss = nll.mean()
        if asked.any():
            loss = loss + nll[asked].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step, tokens = step + 1, tokens + input_ids.numel()
        with torch.no_grad():
            text_rows = ~answers.any(1)
            now = {}
            if text_rows.any():
                now["text_nll"] = nll[text_rows].mean().item()
            if asked.any():
                now["recall_nll"] = nll[asked].mean().item()
                now["recall_accuracy"] = (logits.argmax(-1)[asked] == targets[asked]).float().mean().item()
        for name, value in now.items():
            running[name] = 0.97 * running.get(name, value) + 0.03 * value
        if step % 100 == 0:
            log(phase="text", context=stage.context, step=step, tokens=tokens, **running)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("recipes/teacher"))
    parser.add_argument("--circuit-minutes", type=float, default=20, help="the circuit phase's limit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state", type=Path, default=Path("runs/teacher"), help="where finished stages are kept")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    log_file = (args.out / "training.jsonl").open("a")
    started = time.time()

    def log(**row: Any) -> None:
        row = {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
        log_file.write(json.dumps(row | {"seconds": round(time.time() - started, 1)}) + "\n")
        log_file.flush()

    tokenizer = train_tokenizer()
    tokenizer.save_pretrained(args.out)
    text = [i for page in stdlib_texts("train") for i in tokenizer(page, add_special_tokens=False)["input_ids"]]
    rng = random.Random(args.seed)
    generator = RecallGenerator(tokenizer, text, seed=args.seed + 1)
    torch.manual_seed(args.seed)
    circuit = partial(train_circuit, words=generator.words, rng=rng, seconds=args.circuit_minutes * 60, log=log)
    stages: list[tuple[str, Callable[[Any], None]]] = [("circuit", circuit)]
    for stage in STAGES:
        train_stage = partial(train_text, text=text, generator=generator, rng=rng, stage=stage, log=log)
        stages.append((f"text-{stage.context}", train_stage))
    model = LlamaForCausalLM(teacher_config(len(tokenizer)))
    for name, train in stages:
        kept = args.state / name
        if (kept / "model.safetensors").exists():
            model = LlamaForCausalLM.from_pretrained(kept, dtype=torch.float32)
            continue
        train(model)
        model.save_pretrained(kept)
    model.save_pretrained(args.out)


if __name__ == "__main__":
    main()
