"""Acceptance measurements of issue 5's data: packed documents, epochs without loss or repetition, streams."""

from __future__ import annotations

import hashlib
import sys
import tempfile
from pathlib import Path
from typing import Any

from tools.acceptance_base import ROOT, line, run


@line(
    "packed",
    "packed documents vs the same documents alone, eight pico models: logits; gradients",
    "<= 1e-5; <= 1e-4 relative",
)
def packed() -> dict[str, Any]:
    from tests.conftest import PICO_MODELS, byte_tokenizer, make_pico
    from tests.data.packed_check import packed_against_alone, packed_rows

    with tempfile.TemporaryDirectory() as root:
        rows = packed_rows(Path(root), byte_tokenizer())
        values = {name: packed_against_alone(make_pico(name, Path(root) / name), rows) for name in PICO_MODELS}
    logits, gradients = (max(found[key] for found in values.values()) for key in ("logits", "gradients"))
    text = f"logits {logits:.2g}, gradients {gradients:.2g}"
    return {"measured": text, "met": logits <= 1e-5 and gradients <= 1e-4, "values": values}


@line(
    "epoch",
    "standard library packed at 512 and 4096 tokens: tokens missing or twice in an epoch; places that are padding; "
    "documents shared with the held-out part",
    "0; <= 1 %; 0",
)
def epoch() -> dict[str, Any]:
    import numpy as np
    from transformers import AutoTokenizer

    from nha_convert.data import PackedDataset, texts, token_stream, training_dataset
    from nha_convert.recipe import Recipe, embedded_teacher

    tokenizer = AutoTokenizer.from_pretrained(embedded_teacher())
    values: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as cache:
        for length in (512, 4096):
            stage = {"kind": "align", "tokens": 6_000_000, "sequence_length": length, "batch_size": 1}
            data = {"sources": [{"source": "stdlib"}], "packing": "documents", "cache": cache}
            recipe = Recipe.model_validate({"model": "embedded", "output": "unused", "data": data, "stages": [stage]})
            dataset = training_dataset(recipe, 0, tokenizer)
            assert isinstance(dataset, PackedDataset) and dataset.sources[0] is not None
            source = dataset.sources[0]
            counts = np.zeros(len(source.stream), np.int64)
            wrong = padding = 0
            for number in range(len(source)):
                ids, end = dataset[number]["input_ids"].numpy(), 0
                for document, start, size in source.pieces(number):
                    first = int(source.stream.starts[document]) + start
                    counts[first : first + size] += 1
                    begin, end = end + len(source.prefix), end + len(source.prefix) + size
                    wrong += int((ids[begin:end] != source.stream.array(first, first + size)).sum())
                padding += length - end
            missing, twice = int((counts == 0).sum()), int((counts > 1).sum())
            share = padding / (len(source) * length)
            values[str(length)] = {"missing": missing, "twice": twice, "wrong": wrong, "padding": share}
        sides = [
            {hashlib.sha256(text.encode()).digest() for text in texts(recipe.data.sources[0], split) if text.strip()}
            for split in ("train", "held_out")
        ]
        held_out = len(token_stream(recipe.data.sources[0], tokenizer, "held_out", limit=65_536, cache=cache))
    lost = sum(one["missing"] + one["twice"] + one["wrong"] for one in values.values())
    share, shared = max(one["padding"] for one in values.values()), len(sides[0] & sides[1])
    text = f"{lost} of {len(counts)} tokens, {100 * share:.2f} % padding, {shared} shared ({held_out} held out)"
    return {"measured": text, "met": lost == 0 and share <= 0.01 and shared == 0 and held_out > 0, "values": values}


@line("streaming", "jsonl and parquet shards from an HTTP server on this machine, one failing midway", "tests pass")
def streaming() -> dict[str, Any]:
    done = run([sys.executable, "-m", "pytest", "-q", "tests/data/test_streaming.py"], ROOT)
    text = done.stdout.strip().splitlines()[-1].strip("= ").rsplit(" in ", 1)[0]
    return {"measured": text, "met": "passed" in text and "failed" not in text and "skipped" not in text}
