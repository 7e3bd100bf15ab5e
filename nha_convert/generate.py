"""Continues a prompt with a checkpoint."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

from . import modeling  # noqa: F401  (registers the NHA classes)
from .devices import find_device
from .errors import InputError
from .inference_windows import change_windows
from .settings import NHASettings


def generate_text(
    checkpoint: Path,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    device: str = "auto",
    stream: bool = False,
    windows: NHASettings | None = None,
) -> dict[str, Any]:
    """The continuation of a prompt.

    Args:
        checkpoint: folder of a model, NHA or not, with its tokenizer.
        temperature: 0 is greedy.
        stream: print the text as it is made.
        windows: other windows than the checkpoint's (`change_windows`); None leaves them.
    Returns:
        {"prompt", "text" (the continuation), "prompt_tokens", "new_tokens", "tokens_per_second", "windows" (of each
        layer, None where it never was converted; absent for a model that is not NHA)}.
    Raises:
        InputError: an empty prompt, no such device, windows that do not fit, or a folder that cannot be loaded.
    """
    place = find_device(device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto").to(place).eval()
    except (OSError, ValueError) as error:
        raise InputError(f"{checkpoint}: cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    if windows is not None:
        change_windows(model, windows)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(place)
    length = inputs["input_ids"].shape[1]
    if length == 0:
        raise InputError("--prompt: is empty; give at least one token of text")
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    started = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(
            **inputs,
            **sampling,
            max_new_tokens=max_new_tokens,
            streamer=streamer,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )
    seconds = time.perf_counter() - started
    new = output[0, length:]
    there = {"windows": model.config.nha_windows} if hasattr(model.config, "nha_windows") else {}
    return there | {
        "prompt": prompt,
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "prompt_tokens": length,
        "new_tokens": len(new),
        "tokens_per_second": round(len(new) / seconds, 1),
    }
