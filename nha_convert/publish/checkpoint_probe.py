"""Loads a checkpoint as a stranger would and measures it: `python -I checkpoint_probe.py JOB.json RESULT.json`.

Runs alone in a fresh process, with torch, transformers and safetensors only: it imports nothing of this
project, and refuses `nha_convert` and `nha_kernels` even where they are installed, so that what is
measured is the code in the folder. That code is run: the caller decides whether it may be.

JOB.json: {"checkpoint": folder, "expected": file or null, "teacher": folder or null, "memory": bytes or null,
"tokenizer": bool}
"""

import importlib.abc
import itertools
import json
import math
import sys
import tempfile
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

REFUSED = ("nha_convert", "nha_kernels")
LONGEST, NEW_TOKENS, STEPS, BEAMS, BEAM_PROMPT, RUN = 4096, 16, 24, 3, 256, 16


class Refuse(importlib.abc.MetaPathFinder):
    """Makes our packages impossible to import."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname.split(".")[0] in REFUSED:
            raise ModuleNotFoundError(f"No module named {fullname!r} (refused: the checkpoint must load alone)")


def difference(found: torch.Tensor, wanted: torch.Tensor) -> tuple[float, float]:
    """Largest absolute difference, and the same in units of the largest logit (at least 1)."""
    absolute = (found.float() - wanted.float()).abs().max().item()
    return absolute, absolute / max(1.0, wanted.float().abs().max().item())


def token_error(found: torch.Tensor, wanted: torch.Tensor, routed: bool) -> tuple[float, float]:
    """Largest absolute difference of two computations, and how far they are apart in units of the largest logit.

    Args:
        found: [B, T, V].
        wanted: the same.
        routed: rounding may send a token to other experts, which changes that token altogether; so not the worst
            token counts, but of each run of `RUN` tokens the median, and the worst of these.
    """
    absolute, relative = difference(found, wanted)
    if routed and math.isfinite(relative):
        each = (found.float() - wanted.float()).abs().amax(-1) / max(1.0, wanted.float().abs().max().item())  # [B,T]
        runs = [part for row in each for part in row.split(RUN) if len(part) == RUN]
        relative = max((run.median().item() for run in runs), default=relative)
    return absolute, relative


def load(folder: str, **options: Any) -> Any:
    """The model, strictly: no tensor missing, none left over, none from a pickle.

    Raises:
        ValueError: tensors are missing or unexpected, or the class is not the folder's own.
    """
    model, report = AutoModelForCausalLM.from_pretrained(
        folder,
        trust_remote_code=True,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
        **options,
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


def padded_error(model: Any, input_ids: torch.Tensor, routed: bool) -> tuple[float, float]:
    """A left-padded row in a batch against the row alone: largest difference, absolute and relative."""
    total = input_ids.shape[1]
    padding = max(1, total // 3)
    alone = model(input_ids=input_ids[1:, padding:], use_cache=False).logits
    mask = torch.ones_like(input_ids)
    mask[1, :padding] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)  # as generate gives them
    batch = model(input_ids=input_ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    return token_error(batch[1:, padding:], alone, routed)


def compare_generation(model: Any, prompt: torch.Tensor, slack: float) -> dict[str, Any]:
    """Tokens with and without cache, which must be the same or tie.

    Args:
        slack: what the logits of two equal computations may differ by; candidates that are closer than that tie.
    """
    options: dict[str, Any] = {
        "max_new_tokens": NEW_TOKENS,
        "min_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "pad_token_id": 0,
    }
    greedy = options | {"attention_mask": torch.ones_like(prompt), "num_beams": 1}
    plain = model.generate(prompt, use_cache=False, **greedy)[0]
    cached = model.generate(prompt, use_cache=True, **greedy)[0]
    chunked = model.generate(prompt, prefill_chunk_size=max(1, prompt.shape[1] // 5), **greedy)[0]
    result: dict[str, Any] = {"greedy_tokens": cached[prompt.shape[1] :].tolist()}
    for name, found in (("greedy", cached), ("chunked", chunked)):
        same = torch.equal(found, plain)
        tie = not same and _ties(model, plain, found, slack)
        result |= {f"{name}_equal": same or tie, f"{name}_tie": tie}
    short = prompt[:, -BEAM_PROMPT:]
    beams = options | {"attention_mask": torch.ones_like(short), "num_beams": BEAMS}
    beams |= {"return_dict_in_generate": True, "output_scores": True}
    one, other = (model.generate(short, use_cache=use, **beams) for use in (True, False))
    same = torch.equal(one.sequences, other.sequences)
    tie = not same and abs((one.sequences_scores - other.sequences_scores).item()) <= slack
    return result | {"beams_equal": same or tie, "beams_tie": tie}


def _ties(model: Any, plain: torch.Tensor, found: torch.Tensor, slack: float) -> bool:
    """Whether two greedy continuations part where two logits are as close as equal computations may be."""
    place = int((found != plain).nonzero()[0])
    logits = model(input_ids=plain[None, :place], use_cache=False).logits[0, -1].float()
    return (logits[plain[place]] - logits[found[place]]).abs().item() <= slack


def compare_teacher(model: Any, checkpoint: str, teacher: str, input_ids: torch.Tensor) -> dict[str, float]:
    """Largest difference between the teacher and these weights with every window full, both ways of setting them."""
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=True, local_files_only=True)
    config.nha_windows = [None if window is None else "full" for window in config.nha_windows]
    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "dtype": model.dtype}
    logits = AutoModelForCausalLM.from_pretrained(teacher, **options).eval()(input_ids=input_ids).logits
    full = load(checkpoint, config=config, dtype=model.dtype)
    result = {"max_teacher_difference": difference(full(input_ids=input_ids).logits, logits)[0]}
    before = list(model.config.nha_windows)
    model.set_windows("full")
    result["max_set_windows_difference"] = difference(model(input_ids=input_ids).logits, logits)[0]
    model.set_windows(before)
    return result


def examine_tokenizer(folder: str, vocabulary: int) -> dict[str, Any]:
    """Loads the tokenizer, and tries its chat template if it has one."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
    result = {
        "tokenizer": type(tokenizer).__name__,
        "vocabulary_fits": max(tokenizer.get_vocab().values()) < vocabulary,
        "chat_template": bool(tokenizer.chat_template),
    }
    if result["chat_template"]:
        messages = [{"role": "user", "content": "Hello"}]
        result["chat_tokens"] = len(tokenizer.apply_chat_template(messages, return_dict=False))
    return result


def within(memory: int | None, scratch: str) -> dict[str, Any]:
    """Options of `from_pretrained` under which the CPU holds at most `memory` bytes of a model; None sets no limit."""
    if memory is None:
        return {}
    return {"device_map": "auto", "max_memory": {"cpu": memory}, "offload_folder": scratch}


@torch.no_grad()
def probe(job: dict[str, Any], scratch: str) -> dict[str, Any]:
    """Everything that is measured, as one flat dictionary; `scratch` is a folder for tensors left on disk."""
    model = load(job["checkpoint"], **within(job["memory"], scratch))
    config = model.config
    bound = 1e-5 if model.dtype == torch.float32 else 2e-2
    routed = model.dtype != torch.float32 and getattr(config, "num_experts", None) is not None
    result: dict[str, Any] = {
        "model": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "bound": bound,
    }
    if job["expected"]:
        expected = load_file(job["expected"])
        found = model(input_ids=expected["input_ids"]).logits
        result["max_logit_difference"], result["logit_error"] = difference(found, expected["logits"])
    windows = [window for window in config.nha_windows if isinstance(window, int)]
    length = max([256] + [2 * window + config.nha_sinks + 2 * STEPS for window in windows])
    length = min(length, LONGEST, config.max_position_embeddings)
    draw = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, config.vocab_size, (2, length), generator=draw)
    full = model(input_ids=input_ids, use_cache=False).logits
    stepped = cached_logits(model, input_ids, min(windows, default=length))
    result["tokens"] = length
    result["max_cached_difference"], result["cached_error"] = token_error(stepped, full, routed)
    result["max_padded_difference"], result["padded_error"] = padded_error(model, input_ids, routed)
    slack = 2 * bound * max(1.0, full.float().abs().max().item())
    result |= compare_generation(model, input_ids[:1, : length - NEW_TOKENS], slack)
    if job["teacher"]:
        result |= compare_teacher(model, job["checkpoint"], job["teacher"], input_ids)
    if job["tokenizer"]:
        result |= examine_tokenizer(job["checkpoint"], config.vocab_size)
    return result


def main() -> None:
    sys.meta_path.insert(0, Refuse())
    with open(sys.argv[1], encoding="utf-8") as file:
        job = json.load(file)
    with tempfile.TemporaryDirectory() as scratch:
        result = probe(job, scratch)
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump(result, file)


if __name__ == "__main__":
    main()
