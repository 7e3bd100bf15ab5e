"""Loads exported folders and generates with each: `python generation_probe.py JOB.json RESULT.json`.

Needs torch, transformers and safetensors only. JOB.json: {"folders": {name: path}, "package": whether to use
nha-convert's own classes instead of the code in the folders}
"""

import json
import sys
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

LENGTHS, NEW_TOKENS = (61, 23, 40), 32


def rows(vocabulary: int) -> list[list[int]]:
    """Prompts of different lengths, longer and shorter than the windows; the highest ids are special."""
    return [[(7 * i * i + 31 * n + 3) % (vocabulary - 16) for i in range(length)] for n, length in enumerate(LENGTHS)]


def left_padded(prompts: list[list[int]], pad: int) -> dict[str, torch.Tensor]:
    longest = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[pad] * (longest - len(row)) + row for row in prompts]),
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts]),
    }


def load(folder: str) -> Any:
    """The model, with every tensor in its place.

    Raises:
        ValueError: tensors are missing or left over.
    """
    model, report = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    wrong = {key: sorted(report[key])[:3] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(wrong.values()):
        raise ValueError(f"{folder}: {wrong}")
    return model.eval()


@torch.no_grad()
def generate(folder: str) -> dict[str, Any]:
    """Greedy tokens with cache, without, in a left-padded batch and with beams; and the last logits of the batch."""
    model = load(folder)
    prompts = rows(model.config.vocab_size)
    pad = model.config.pad_token_id
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "pad_token_id": pad}
    one, batch = left_padded(prompts[:1], pad), left_padded(prompts, pad)
    start = one["input_ids"].shape[1]
    tokens = {
        "cache": model.generate(**one, **options)[0, start:].tolist(),
        "no cache": model.generate(**one, **options, use_cache=False)[0, start:].tolist(),
        "left padding": model.generate(**batch, **options)[:, start:].tolist(),
        "beams": model.generate(**batch, **options, num_beams=3)[:, start:].tolist(),
        "each alone": [
            model.generate(**left_padded([row], pad), **options)[0, len(row) :].tolist() for row in prompts
        ],
    }
    return {"class": type(model).__module__, "tokens": tokens, "logits": model(**batch).logits[:, -1].tolist()}


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        job = json.load(file)
    if job["package"]:
        import nha_convert.modeling  # noqa: F401  (registers the NHA classes)
    result = {
        "transformers": transformers.__version__,
        "models": {name: generate(folder) for name, folder in job["folders"].items()},
    }
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump(result, file)


if __name__ == "__main__":
    main()
