"""Pushing to the Hub, against a stand-in over real HTTP: the round trip, and everything that the Hub may refuse."""

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_stand_in import TOKEN, Fault, HubStandIn, running_hub
from safetensors.torch import load_file

from nha_convert.convert import load_student
from nha_convert.errors import InputError
from nha_convert.publish.export import export_model
from nha_convert.publish.export_request import export_request
from nha_convert.publish.hub import check_target
from nha_convert.settings import NHASettings
from nha_convert.swap import swap_checkpoint

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = NHASettings(slots=8, window=16, sinks=2, full_attention_layers=[0])
AGAIN = "push again with: nha-convert export {folder} --push somebody/pico"
LOAD = """
import sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

repo, ids, out = sys.argv[1:]
options = {"trust_remote_code": True, "revision": "v2"}
tokenizer = AutoTokenizer.from_pretrained(repo, **options)
model = AutoModelForCausalLM.from_pretrained(repo, **options).eval()
assert type(model).__module__.startswith("transformers_modules"), type(model)
with torch.no_grad():
    logits = model(input_ids=torch.tensor([eval(ids)])).logits
save_file({"logits": logits, "ids": torch.tensor(tokenizer("two words").input_ids)}, out)
"""


@pytest.fixture
def hub() -> Iterator[HubStandIn]:
    with running_hub() as server:
        yield server


@pytest.fixture(scope="module")
def model(pico_llama: Path) -> Any:
    return load_student(pico_llama, SETTINGS, dtype=torch.float32)


@pytest.fixture(scope="module")
def exported(model: Any, pico_llama: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "export"
    return export_model(model, tokenizer, out, teacher_dir=pico_llama, max_shard_size="150KB")


def environment(url: str, home: Path, token: str | None = TOKEN) -> dict[str, str]:
    """The client's: the stand-in in place of the Hub, no proxies, files by LFS and not by Xet."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()}
    kept |= {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    return kept | ({"HF_TOKEN": token} if token else {})


def nha_convert(*arguments: Any, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env=env,
        check=False,
    )


def folder_content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_round_trip(hub: HubStandIn, model: Any, exported: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Push to a branch of a private repository; a process without this package loads it and computes the same."""
    env = environment(hub.url, tmp_path / "home")
    options = ("--private", "--revision", "v2", "--json")
    answer = nha_convert("export", exported, "--push", "somebody/pico", *options, env=env)
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout)
    assert found["folder"] == str(exported) and found["pushed"].startswith(f"{hub.url}/somebody/pico/commit/")
    assert hub.repositories["somebody/pico"].private
    sent = hub.files("somebody/pico", "v2")
    assert {name: data for name, data in sent.items() if name != ".gitattributes"} == folder_content(exported)
    assert set(hub.files("somebody/pico", "main")) == {".gitattributes"}
    ids = [7, 1, 200, 3] * 10
    loaded = subprocess.run(
        [sys.executable, "-I", "-c", LOAD, "somebody/pico", str(ids), str(tmp_path / "found.safetensors")],
        capture_output=True,
        text=True,
        env=env,
        cwd=tmp_path,
        check=False,
    )
    assert loaded.returncode == 0, loaded.stderr
    result = load_file(tmp_path / "found.safetensors")
    with torch.no_grad():
        assert torch.equal(result["logits"], model(input_ids=torch.tensor([ids])).logits)
    assert result["ids"].tolist() == tokenizer("two words").input_ids


def test_a_second_push_replaces_the_first(
    hub: HubStandIn, exported: Path, model: Any, pico_llama: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """Shards and code that the new export does not have go; files that are none of ours stay; notes are not sent."""
    mine = {"picture.png": b"png", ".gitattributes": b"lfs"}
    hub.add("somebody/pico", mine | {"model.safetensors": b"old", "old_code.py": b"", "config.json": b"{}"})
    env = environment(hub.url, tmp_path / "home")
    assert nha_convert("export", exported, "--push", "somebody/pico", env=env).returncode == 0
    assert hub.files("somebody/pico") == mine | folder_content(exported)
    whole = export_model(model, tokenizer, tmp_path / "whole", teacher_dir=pico_llama)
    content = folder_content(whole)
    (whole / "notes.txt").write_text("mine", encoding="utf-8")
    answer = nha_convert("export", whole, "--push", "somebody/pico", env=env)
    assert answer.returncode == 0, answer.stderr
    assert hub.files("somebody/pico") == mine | content


def test_a_short_failure_is_survived(hub: HubStandIn, exported: Path, tmp_path: Path) -> None:
    hub.faults.append(Fault("PUT", "^/lfs/", 500, times=1))
    answer = nha_convert(
        "export", exported, "--push", "somebody/pico", "-q", env=environment(hub.url, tmp_path / "home")
    )
    assert (answer.returncode, answer.stdout) == (0, "")
    assert hub.files("somebody/pico")["config.json"] == (exported / "config.json").read_bytes()


FAULTS = {
    "403": (Fault("POST", "/preupload/", 403, "You are not allowed to write here"), "403: You are not allowed"),
    "409": (Fault("POST", "/commit/", 409, "Another commit came first"), "409: Another commit came first"),
    "500": (Fault("POST", "/commit/", 500, "Internal trouble"), "500: Internal trouble"),
    "dropped": (Fault("POST", "/commit/", 0), "RemoteProtocolError: "),
    "card": (Fault("POST", "/validate-yaml", 400, "bad card"), "400: bad card"),
}


@pytest.mark.parametrize("kind", sorted(FAULTS))
def test_refusals_keep_the_export(kind: str, hub: HubStandIn, exported: Path, tmp_path: Path) -> None:
    fault, words = FAULTS[kind]
    hub.faults.append(fault)
    before = folder_content(exported)
    answer = nha_convert("export", exported, "--push", "somebody/pico", env=environment(hub.url, tmp_path / "home"))
    assert answer.returncode == 1
    lines = answer.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"error: somebody/pico: the Hub did not take it ({words}"), lines
    assert AGAIN.format(folder=exported) in lines[0]
    assert folder_content(exported) == before
    assert set(hub.files("somebody/pico")) == {".gitattributes"}


def test_another_namespace_is_refused_by_the_hub(hub: HubStandIn, exported: Path, tmp_path: Path) -> None:
    answer = nha_convert("export", exported, "--push", "other/pico", env=environment(hub.url, tmp_path / "home"))
    assert answer.returncode == 1 and "403: You don't have the rights" in answer.stderr
    assert "other/pico" not in hub.repositories


def test_private_does_not_publish(hub: HubStandIn, exported: Path, tmp_path: Path) -> None:
    hub.add("somebody/pico", {"README.md": b""})
    answer = nha_convert(
        "export", exported, "--push", "somebody/pico", "--private", env=environment(hub.url, tmp_path / "home")
    )
    assert answer.returncode == 1 and "is public, but --private was given; nothing was sent" in answer.stderr
    assert hub.files("somebody/pico") == {"README.md": b""}


def test_no_network_after_the_export(pico_llama: Path, hub: HubStandIn, tmp_path: Path) -> None:
    """What was asked for is written; only the sending fails, and works when it is repeated."""
    swap_checkpoint(pico_llama, tmp_path / "swapped", SETTINGS, quiet=True)
    hub.add("somebody/pico", {})
    arguments = ("export", tmp_path / "swapped", tmp_path / "out", "--push", "somebody/pico")
    answer = nha_convert(*arguments, env=environment("http://127.0.0.1:9", tmp_path / "home"))
    assert answer.returncode == 1 and "ConnectError" in answer.stderr
    assert AGAIN.format(folder=tmp_path / "out") in answer.stderr
    again = answer.stderr.partition("push again with: nha-convert ")[2].split()
    answer = nha_convert(*again, env=environment(hub.url, tmp_path / "home"))
    assert answer.returncode == 0, answer.stderr
    assert hub.files("somebody/pico") == folder_content(tmp_path / "out")


@pytest.mark.parametrize(("token", "words"), [(None, "hf auth login"), ("hf_wrong", "the Hub refuses the token (401")])
def test_without_a_token_nothing_is_written(
    token: str | None, words: str, hub: HubStandIn, exported: Path, tmp_path: Path
) -> None:
    env = environment(hub.url, tmp_path / "home", token)
    answer = nha_convert("export", exported, tmp_path / "out", "--push", "somebody/pico", env=env)
    assert answer.returncode == 2 and answer.stderr.startswith("error: --push somebody/pico: ")
    assert words in answer.stderr and len(answer.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists() and not hub.repositories


@pytest.mark.parametrize("repo", ["pico", "a/b/c", "some body/pico", "somebody/pi--co", "somebody/pico.git", "/", "a/"])
def test_bad_names_are_refused_at_once(repo: str) -> None:
    with pytest.raises(InputError, match="--push .*(USER/NAME is needed|no name for a repository)"):
        check_target(repo)


def test_contradictions_are_refused(exported: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(exported, tmp_path / "changed"))
    (changed / "config.json").unlink()
    none = dict.fromkeys(("push", "revision", "teacher", "max_shard_size"), None) | {"private": False}
    push = {"push": "somebody/pico"}
    cases: list[tuple[Path, Path | None, dict[str, Any], str]] = [
        (exported, tmp_path / "out", {"private": True}, "--private: belongs to a push"),
        (exported, tmp_path / "out", {"revision": "x"}, "--revision: belongs to a push"),
        (exported, None, {}, "OUT: is missing"),
        (tmp_path, None, push, "holds no export.json, so it is no finished export"),
        (changed, None, push, "config.json: is missing"),
        (exported, None, push | {"max_shard_size": "1GB"}, "--max-shard-size: changes what is written"),
        (exported, None, push | {"teacher": "a/b"}, "--teacher: changes what is written"),
        (exported, tmp_path / "out", {"max_shard_size": "0GB"}, "--max-shard-size 0GB: give a number above 0"),
        (exported, tmp_path / "out", {"max_shard_size": "big"}, "--max-shard-size big: give a number above 0"),
        (exported, exported, {}, "exists and is not an empty folder"),
    ]
    for source, out, options, words in cases:
        with pytest.raises(InputError, match=words):
            export_request(source, out, **(none | options))
    answer = nha_convert("export", exported, "--private", env=environment("http://127.0.0.1:9", tmp_path / "home"))
    assert answer.returncode == 2 and answer.stderr.startswith("error: --private: belongs to a push")
    assert export_request(exported.parent, None, **(none | push)).source == exported  # as in a run folder


def test_licence_is_asked_of_the_hub(hub: HubStandIn, tmp_path: Path) -> None:
    """A base model on the Hub whose README.md the local folder does not have: its card is read over HTTP."""
    hub.add("somebody/base", {"README.md": b"---\nlicense: llama3.2\nlanguage: en\n---\n"})
    (tmp_path / "snapshot").mkdir()
    code = (
        "import sys; from pathlib import Path; from nha_convert.publish.base_model import read_base_model; "
        "print([(base.hub_id, base.licence, base.languages) for base in "
        "(read_base_model(name, Path('snapshot')) for name in ('somebody/base', 'somebody/absent'))])"
    )
    path = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    answer = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment(hub.url, tmp_path / "home") | path,
        cwd=tmp_path,
        check=True,
    )
    assert ast.literal_eval(answer.stdout) == [
        ("somebody/base", {"license": "llama3.2"}, ["en"]),
        ("somebody/absent", {}, []),
    ]
