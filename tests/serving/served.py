"""An exported folder with a chat template, a server process on it, and what `generate` says to the same messages."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nha_convert.convert import load_student
from nha_convert.publish.export import export_model
from nha_convert.recipe import embedded_teacher
from nha_convert.settings import NHASettings

REPETITION_PENALTY = 1.3  # an untrained student soon repeats itself, and equal repetitions would say little
ROOT = Path(__file__).resolve().parents[2]
CLI = [sys.executable, str(ROOT / "cli.py")]
SETTINGS = NHASettings(slots=16, window=24, sinks=2, full_attention_layers=[1])
CHAT_TEMPLATE = (
    "{% for message in messages %}# {{ message['role'] }}\n{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}# assistant\n{% endif %}"
)
PROMPTS = {  # prompt: tokens to write; lengths on both sides of the window
    "def main(": 40,
    "import os\nimport sys\n\n\ndef walk(path, follow_links=False):": 24,
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):": 33,
    "Return the": 48,
    "x": 17,
    "for key, value in sorted(table.items()):\n    if value is None:\n        continue\n    print(": 29,
    "raise ValueError(f'": 36,
    "try:\n    return self._cache[name]\nexcept KeyError:\n" * 6: 21,
}


def make_folder(out: Path) -> Path:
    """Export the embedded teacher as an untrained student of three NHA layers and a full one, with a chat template."""
    teacher = embedded_teacher()
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    export_model(load_student(teacher, SETTINGS), tokenizer, out, teacher_dir=teacher)
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return out


def alone(program: str, *arguments: Any, cwd: Path) -> Any:
    """What a program prints as JSON, run in a process that cannot import this project; the folder's code serves."""
    hide = "import sys; sys.modules.update(nha_convert=None, nha_kernels=None)\n"
    done = subprocess.run(
        [sys.executable, "-I", "-c", hide + program, *map(str, arguments)],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(cwd / "modules")},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@dataclass
class Server:
    """A running server.

    Attributes:
        url: base of the OpenAI-compatible routes.
        model: the name that requests give.
        log: what it printed.
    """

    url: str
    model: str
    log: Path
    process: subprocess.Popen[bytes]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def running(command: list[str], model: str, log: Path, cwd: Path, seconds: float = 120) -> Iterator[Server]:
    """Run a server command, `--port` appended, until the block ends.

    Raises:
        RuntimeError: it ended, or did not answer in time; with what it printed.
    """
    port = free_port()
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    with open(log, "wb") as out:
        process = subprocess.Popen(
            [*command, "--port", str(port)], cwd=cwd, stdout=out, stderr=subprocess.STDOUT, env=environment
        )
    try:
        deadline = time.monotonic() + seconds
        while not _healthy(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{' '.join(command)}: no answer\n{log.read_text()[-3000:]}")
            time.sleep(0.2)
        yield Server(f"http://127.0.0.1:{port}/v1", model, log, process)
    finally:
        process.terminate()
        process.wait(30)


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def greedy(model: Any, inputs: Any, tokens: int) -> torch.Tensor:
    """The tokens [N] that follow one row of inputs."""
    with torch.no_grad():
        out = model.generate(**inputs, do_sample=False, max_new_tokens=tokens, repetition_penalty=REPETITION_PENALTY)
    return out[0, inputs["input_ids"].shape[1] :]


def generated(folder: Path, prompts: dict[str, int]) -> dict[str, str]:
    """What `generate` answers to each prompt as a chat, greedily, each alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    answers = {}
    for prompt, tokens in prompts.items():
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        answers[prompt] = tokenizer.decode(greedy(model, inputs, tokens), skip_special_tokens=True)
    return answers


def chat(server: Server, prompt: str, tokens: int, stream: bool) -> str:
    """The server's greedy answer to one message."""
    from openai import OpenAI

    client = OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=240)
    answer: Any = client.chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": prompt}],
        max_tokens=tokens,
        temperature=0,
        frequency_penalty=REPETITION_PENALTY - 1,
        stream=stream,
    )
    if not stream:
        return answer.choices[0].message.content or ""
    return "".join(chunk.choices[0].delta.content or "" for chunk in answer if chunk.choices)
