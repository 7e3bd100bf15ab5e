"""`pipeline("text-generation")` on an exported folder, in a process that has only the folder's own code."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.serving.served import PROMPTS, REPETITION_PENALTY, alone, generated, greedy

TOKENS = 20
PROGRAM = """
import json
from transformers import TextIteratorStreamer, pipeline

folder, prompts, options = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
pipe = pipeline("text-generation", model=folder, trust_remote_code=True)
pipe.tokenizer.padding_side = "left"
pick = lambda outputs: [output[0]["generated_text"] for output in outputs]
result = {"module": type(pipe.model).__module__}
result["single"] = pick(pipe(prompt, return_full_text=False, **options) for prompt in prompts)
result["batch"] = pick(pipe(prompts, batch_size=len(prompts), return_full_text=False, **options))
chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
result["chat"] = [messages[-1]["content"] for messages in pick(pipe(chats, batch_size=3, **options))]
streamer = TextIteratorStreamer(pipe.tokenizer, skip_prompt=True)
pipe(prompts[0], streamer=streamer, **options)
result["streamed"] = list(streamer)
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def result(served_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    options = {"do_sample": False, "max_new_tokens": TOKENS, "repetition_penalty": REPETITION_PENALTY}
    cwd = tmp_path_factory.mktemp("pipeline")
    found: dict[str, Any] = alone(PROGRAM, served_folder, json.dumps(list(PROMPTS)), json.dumps(options), cwd=cwd)
    assert found["module"].startswith("transformers_modules.")
    return found


@pytest.fixture(scope="module")
def wanted(served_folder: Path) -> list[str]:
    """What `generate` continues each prompt with, each alone."""
    model = AutoModelForCausalLM.from_pretrained(served_folder)
    tokenizer = AutoTokenizer.from_pretrained(served_folder)
    return [tokenizer.decode(greedy(model, tokenizer(prompt, return_tensors="pt"), TOKENS)) for prompt in PROMPTS]


def test_each_alone(result: dict[str, Any], wanted: list[str]) -> None:
    assert result["single"] == wanted


def test_a_padded_batch_of_eight_lengths(result: dict[str, Any], wanted: list[str]) -> None:
    assert result["batch"] == wanted


def test_chats_in_padded_batches(result: dict[str, Any], served_folder: Path) -> None:
    assert result["chat"] == list(generated(served_folder, dict.fromkeys(PROMPTS, TOKENS)).values())


def test_streamed(result: dict[str, Any], wanted: list[str]) -> None:
    assert "".join(result["streamed"]) == wanted[0]
    assert len(result["streamed"]) > 3  # in pieces, not at the end
