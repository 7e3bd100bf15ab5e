"""transformers' server on an exported folder: what it answers is what `generate` answers."""

import importlib.util
import json
import os
import pty
import re
import select
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from openai import APIError, BadRequestError, InternalServerError, OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer

from nha_convert.errors import InputError
from nha_convert.serve import serve_checkpoint
from tests.serving.served import (
    CLI,
    PROMPTS,
    REPETITION_PENALTY,
    ROOT,
    Server,
    chat,
    free_port,
    generated,
    greedy,
    running,
)

WITHOUT_US = "import runpy, sys; sys.modules.update(nha_convert=None, nha_kernels=None); sys.argv = sys.argv[1:]; "


@pytest.fixture(scope="module")
def wanted(served_folder: Path) -> dict[str, str]:
    answers = generated(served_folder, PROMPTS)
    assert len(set(answers.values())) == len(PROMPTS)  # else equality would say little
    return answers


@pytest.fixture(scope="module")
def server(served_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("log") / "server.log"
    command = [*CLI, "serve", served_folder.name, "--device", "cpu"]
    with running(command, served_folder.name, log, served_folder.parent) as running_server:
        yield running_server


def client(server: Server) -> OpenAI:
    return OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=120)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_eight_chats_at_once_equal_generate(server: Server, wanted: dict[str, str], stream: bool) -> None:
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        futures = {prompt: pool.submit(chat, server, prompt, n, stream) for prompt, n in PROMPTS.items()}
        found = {prompt: future.result() for prompt, future in futures.items()}
    assert found == wanted


def test_the_folder_is_the_model(server: Server) -> None:
    assert [model.id for model in client(server).models.list()] == [server.model]
    with pytest.raises(BadRequestError) as refusal:
        client(server).chat.completions.create(model="other", messages=[{"role": "user", "content": "x"}])
    assert f"pinned to '{server.model}'" in refusal.value.response.text


def test_responses(server: Server, wanted: dict[str, str]) -> None:
    prompt, tokens = next(iter(PROMPTS.items()))
    answer = client(server).responses.create(
        model=server.model,
        input=prompt,
        max_output_tokens=tokens,
        temperature=0,
        stream=False,
        extra_body={"generation_config": json.dumps({"repetition_penalty": REPETITION_PENALTY})},
    )
    assert answer.output_text == wanted[prompt]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_completions(server: Server, served_folder: Path, stream: bool) -> None:
    prompt, tokens = list(PROMPTS.items())[1]
    model = AutoModelForCausalLM.from_pretrained(served_folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(served_folder)
    answer = client(server).completions.create(
        model=server.model,
        prompt=prompt,
        max_tokens=tokens,
        temperature=0,
        frequency_penalty=REPETITION_PENALTY - 1,
        stream=stream,
    )
    text = "".join(chunk.choices[0].text for chunk in answer) if stream else answer.choices[0].text
    assert text == tokenizer.decode(greedy(model, tokenizer(prompt, return_tensors="pt"), tokens))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ('{"cache_implementation": "static", "max_new_tokens": 4}', "cannot hold NHA states"),
        ('{"prompt_lookup_num_tokens": 2, "max_new_tokens": 4}', "assisted generation is not supported"),
    ],
)
def test_what_is_refused_is_said_and_survived(
    server: Server, wanted: dict[str, str], settings: str, reason: str
) -> None:
    prompt, tokens = next(iter(PROMPTS.items()))
    request = {
        "model": server.model,
        "messages": [{"role": "user", "content": prompt}],
        "extra_body": {"generation_config": settings},
    }
    said = server.log.read_text().count(reason)
    with pytest.raises(InternalServerError):
        client(server).chat.completions.create(**request)  # type: ignore[call-overload]
    deadline = time.monotonic() + 20
    while server.log.read_text().count(reason) == said:  # the log may come after the answer
        assert time.monotonic() < deadline, server.log.read_text()[-2000:]
        time.sleep(0.1)
    with pytest.raises(APIError) as refusal:
        list(client(server).chat.completions.create(**request, stream=True))  # type: ignore[call-overload]
    assert reason in str(refusal.value.body)
    assert chat(server, prompt, tokens, False) == wanted[prompt]


def test_a_client_that_leaves_frees_the_server(server: Server, wanted: dict[str, str]) -> None:
    prompt, tokens = next(iter(PROMPTS.items()))
    stream = client(server).chat.completions.create(
        model=server.model, messages=[{"role": "user", "content": prompt}], max_tokens=100_000, stream=True
    )
    next(iter(stream))
    stream.close()
    assert chat(server, prompt, tokens, False) == wanted[prompt]


def test_chat_client(server: Server, tmp_path: Path) -> None:
    """`transformers chat` in a terminal: one message, greedy, then `!exit`."""
    prompt, tokens = "def main(", 12
    command = ["-m", "transformers.cli.transformers", "chat", server.model, server.url]
    flags = [f"max_new_tokens={tokens}", "do_sample=False", f"repetition_penalty={REPETITION_PENALTY}"]
    online = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}  # it refuses loopback too
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, *command, *flags],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        cwd=tmp_path,
        env=online | {"COLUMNS": "200", "TERM": "dumb", "HF_HUB_DISABLE_UPDATE_CHECK": "1"},
    )
    os.close(follower)
    try:
        read_until(leader, r">:\s*\n")
        os.write(leader, f"{prompt}\n".encode())
        seen = read_until(leader, r"(?s)tok/s.*Continue generating\?.*: ")
        os.write(leader, b"n\n")
        os.write(leader, b"!exit\n")
        assert process.wait(60) == 0
    finally:
        process.kill()
        os.close(leader)
    answer = chat(server, prompt, tokens, False)
    words = re.findall(r"\w{3,}", answer)
    assert words and all(word in seen for word in words), (answer, seen)


def read_until(terminal: int, pattern: str, seconds: float = 60) -> str:
    """What a terminal shows until `pattern` matches."""
    seen, deadline = "", time.monotonic() + seconds
    while not re.search(pattern, seen):
        ready, _, _ = select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"no {pattern!r} in {seen!r}"
        seen += os.read(terminal, 65536).decode(errors="replace")
    return seen


def launcher(folder: Path) -> Path:
    """The launcher of docs/serving.md as a file."""
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(import sys\n.*?)^```$", text, re.MULTILINE | re.DOTALL)
    path = folder / "serve_nha.py"
    path.write_text(code, encoding="utf-8")
    return path


def test_documented_launcher_without_our_package(served_folder: Path, wanted: dict[str, str], tmp_path: Path) -> None:
    """Continuous batching is asked for, and must be declined."""
    program = WITHOUT_US + "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-I", "-c", program, str(launcher(tmp_path)), str(served_folder)]
    with running(
        [*command, "--device", "cpu", "--continuous-batching"], str(served_folder), tmp_path / "log", tmp_path
    ) as alone:
        prompt, tokens = list(PROMPTS.items())[-1]
        assert chat(alone, prompt, tokens, True) == wanted[prompt]
        log = alone.log.read_text()
    assert "CB: False" in log and "does not support continuous batching" in log


def test_without_a_chat_template(served_folder: Path, tmp_path: Path) -> None:
    """It is said at the start, chats fail, completions work."""
    bare = tmp_path / "base model"
    bare.mkdir()
    for path in served_folder.iterdir():
        if path.name != "chat_template.jinja":
            shutil.copyfile(path, bare / path.name)
    with running([*CLI, "serve", str(bare), "--device", "cpu"], str(bare), tmp_path / "log", tmp_path) as server:
        assert "its tokenizer has no chat template" in server.log.read_text()
        with pytest.raises(InternalServerError):
            chat(server, "x", 4, False)
        answer = client(server).completions.create(model=server.model, prompt="import", max_tokens=4, temperature=0)
        assert answer.usage is not None and answer.usage.completion_tokens == 4


def test_command_line_refuses_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run([*CLI, "serve", str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert f"error: {tmp_path}: no checkpoint folder (no config.json in it)" in done.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "int8"}, r"--dtype int8: one of auto, float32, bfloat16, float16"),
        ({"device": "toaster"}, r"device: one of auto, cpu, mps, cuda or cuda:N is needed, found 'toaster'"),
        ({"host": "no-such-host.invalid"}, r"--host no-such-host.invalid: no address of this machine"),
        ({"host": "192.0.2.1"}, r"--host 192.0.2.1 --port \d+: cannot listen there"),
    ],
)
def test_bad_options_are_refused(served_folder: Path, options: dict[str, str], said: str) -> None:
    with pytest.raises(InputError, match=said) as refusal:
        serve_checkpoint(served_folder, port=free_port(), **options)  # type: ignore[arg-type]
    assert "\n" not in str(refusal.value)


def test_port_in_use_is_refused(served_folder: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=rf"--port {port}: is in use on localhost; give another: --port \d+"):
            serve_checkpoint(served_folder, port=port)


def test_bad_folders_are_refused(served_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a@b").symlink_to(served_folder)
    with pytest.raises(InputError, match="a@b: .* give a path without it"):
        serve_checkpoint(tmp_path / "a@b", port=free_port())
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in served_folder.iterdir():
        if "token" not in path.name:
            (bare / path.name).symlink_to(path)
    with pytest.raises(InputError, match="bare: cannot be loaded: ") as refusal:
        serve_checkpoint(bare, port=free_port())
    assert "\n" not in str(refusal.value)


def test_missing_packages_are_named(served_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in ("fastapi", "openai") else find(name, *rest)
    )
    with pytest.raises(InputError, match=r"fastapi, openai not installed; .*pip install 'nha-convert\[serve\]'"):
        serve_checkpoint(served_folder)
