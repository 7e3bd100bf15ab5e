"""Loads a checkpoint as a stranger would and measures it: `python -I checkpoint_probe.py JOB.json RESULT.json`.

Runs alone in a fresh process, with torch, transformers and safetensors only: it imports nothing of this
project, and refuses `nha_convert` and `nha_kernels` even where they are installed, so that what is
measured is the code in the folder.

JOB.json: {"checkpoint": folder, "expected": file or null, "teacher": folder or null}
"""

import importlib.abc
import itertools
import json
import sys
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

REFUSED = ("nha_convert", "nha_kernels")
LONGEST, NEW_TOKENS, STEPS = 4096, 16, 24


class Refuse(importlib.abc.MetaPathFinder):
    """Makes our packages impossible to import."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname.split(".")[0] in REFUSED:
            raise ModuleNotFoundError(f"No module named {fullname!r} (refused: the checkpoint must load alone)")


def difference(found: torch.Tensor, wanted: torch.Tensor) -> tuple[float, float]:
    """Largest absolute difference, and the same in units of the largest logit (at least 1)."""
    absolute = (found.float() - wanted.float()).abs().max().item()
    return absolute, absolute / max(1.0, wanted.float().abs().max().item())


def load(folder: str) -> Any:
    """The model, strictly: no tensor missing, none left over.

    Raises:
        ValueError: tensors are missing or unexpected, or the class is not the folder's own.
    """
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, local_files_only=True, output_loading_info=True
    )
    wrong = {
        key: sorted(report[key])[:3] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if report[key]
    }
    if wrong:
        raise ValueError(f"the weights do not fit the model: {wrong}")
    if not type(model).__module__.startswith("transformers_modules"):
        raise ValueError(f"loaded {type(model).__module__}, which is not the checkpoint's own code")
    return model.eval()


def cached_logits(model: Any, input_ids: torch.Tensor, window: int) -> torch.Tensor:
    """Logits through the cache: a first piece shorter than the window, steps, one long piece, steps to the end."""
    total = input_ids.shape[1]
    first = max(1, min(window // 2, total // 4))
    middle = max(first + STEPS, total - STEPS)
    cuts = [0, first, *range(first + 1, min(first + STEPS, total) + 1), *range(middle, total + 1)]
    cuts = sorted({cut for cut in cuts if cut <= total} | {total})
    cache, pieces = None, []
    for start, end in itertools.pairwise(cuts):
        output = model(input_ids=input_ids[:, start:end], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    return torch.cat(pieces, dim=1)


def compare_generation(model: Any, prompt: torch.Tensor, bound: float) -> dict[str, Any]:
    """Greedy tokens with and without cache; a first difference counts as equal only where two logits tie."""
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(prompt)
    cached = model.generate(prompt, attention_mask=mask, use_cache=True, **options)[0]
    plain = model.generate(prompt, attention_mask=mask, use_cache=False, **options)[0]
    result = {"greedy_tokens": cached[prompt.shape[1] :].tolist(), "greedy_tie": False}
    if torch.equal(cached, plain):
        return result | {"greedy_equal": True}
    place = int((cached != plain).nonzero()[0])
    logits = model(input_ids=plain[None, :place], use_cache=False).logits[0, -1].float()
    gap = (logits[plain[place]] - logits[cached[place]]).abs().item()
    tie = gap <= 2 * bound * max(1.0, logits.abs().max().item())
    return result | {"greedy_equal": tie, "greedy_tie": tie}


def compare_teacher(checkpoint: str, teacher: str, input_ids: torch.Tensor, dtype: torch.dtype) -> float:
    """Largest difference between the teacher and this folder's weights with every window full."""
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=True, local_files_only=True)
    config.nha_windows = [None] * config.num_hidden_layers
    full = AutoModelForCausalLM.from_pretrained(
        checkpoint, config=config, trust_remote_code=True, local_files_only=True, dtype=dtype
    ).eval()
    original = AutoModelForCausalLM.from_pretrained(teacher, local_files_only=True, dtype=dtype).eval()
    return difference(full(input_ids=input_ids).logits, original(input_ids=input_ids).logits)[0]


@torch.no_grad()
def probe(job: dict[str, Any]) -> dict[str, Any]:
    """Everything that is measured, as one flat dictionary."""
    model = load(job["checkpoint"])
    config = model.config
    bound = 1e-5 if model.dtype == torch.float32 else 2e-2
    result: dict[str, Any] = {
        "model": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "bound": bound,
    }
    if job["expected"]:
        expected = load_file(job["expected"])
        found = model(input_ids=expected["input_ids"]).logits
        result["max_logit_difference"], result["logit_error"] = difference(found, expected["logits"])
    windows = [window for window in config.nha_windows if window is not None]
    length = max([256] + [2 * window + config.nha_sinks + 2 * STEPS for window in windows])
    length = min(length, LONGEST, config.max_position_embeddings)
    draw = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, config.vocab_size, (2, length), generator=draw)
    full = model(input_ids=input_ids, use_cache=False).logits
    stepped = cached_logits(model, input_ids, min(windows, default=length))
    result["tokens"] = length
    result["max_cached_difference"], result["cached_error"] = difference(stepped, full)
    result |= compare_generation(model, input_ids[:1, : length - NEW_TOKENS], bound)
    if job["teacher"]:
        result["max_teacher_difference"] = compare_teacher(job["checkpoint"], job["teacher"], input_ids, model.dtype)
    if job["tokenizer"]:
        tokenizer = AutoTokenizer.from_pretrained(job["checkpoint"], trust_remote_code=True, local_files_only=True)
        result["tokenizer"] = type(tokenizer).__name__
        result["vocabulary_fits"] = max(tokenizer.get_vocab().values()) < config.vocab_size
    return result


def main() -> None:
    sys.meta_path.insert(0, Refuse())
    with open(sys.argv[1], encoding="utf-8") as file:
        job = json.load(file)
    result = probe(job)
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump(result, file)


if __name__ == "__main__":
    main()
