"""The folder of tasks for lm-evaluation-harness, and the harness on a model in memory (slow, where it is installed)."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from nha_convert.errors import InputError
from nha_convert.evaluate.harness import check_tasks, run_harness, task_folder
from nha_convert.evaluate.recall_tasks import TASKS
from nha_convert.evaluate_checkpoint import evaluate_checkpoint
from nha_convert.recipe import embedded_teacher

TEACHER = str(embedded_teacher())
needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")


class Loader(yaml.SafeLoader):
    """Reads `!function utils.x` as its text."""


Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def read(name: str) -> dict[str, Any]:
    """A task's settings, with those it includes."""
    found: dict[str, Any] = yaml.load((task_folder() / name).read_text(encoding="utf-8"), Loader)
    return (read(found["include"]) if "include" in found else {}) | found


@pytest.fixture(scope="module")
def utils() -> Iterator[ModuleType]:
    """utils.py as the harness loads it: by its path."""
    spec = importlib.util.spec_from_file_location("nha_lm_eval_utils", task_folder() / "utils.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module


def test_every_task_has_its_file(utils: ModuleType) -> None:
    group = read("nha_recall.yaml")
    assert group["task"] == [f"nha_{name}" for name in TASKS]
    assert {path.name for path in task_folder().glob("*.yaml")} == {
        "nha_recall.yaml",
        *(f"{one}.yaml" for one in group["task"]),
    }
    metrics = ["exact_match", *(f"exact_match_x{distance:g}" for distance in utils.DISTANCES)]
    metrics += [f"exact_match_p{pairs}" for pairs in utils.PAIRS]
    for name, kind in TASKS.items():
        task = read(f"nha_{name}.yaml")
        assert task["task"] == f"nha_{name}" and task["output_type"] == "generate_until"
        assert [metric["metric"] for metric in task["metric_list"]] == metrics
        assert task["generation_kwargs"]["max_gen_toks"] >= kind().answer
        for key in ("custom_dataset", "process_results"):
            module, _, function = task[key].partition(".")
            assert module == "utils" and callable(getattr(utils, function))
        assert getattr(utils, name).args == (name,)


@pytest.mark.parametrize("name", TASKS)
def test_documents_ask_what_they_say(name: str, utils: ModuleType) -> None:
    """The answer's first word stands at about the distance that is named, in text that the positions have room for."""
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    made = getattr(utils, name)(
        pretrained=TEACHER, window=32, distances=[0.5, 4, 16, 200], prompts=3, pairs=[4, 8], version=1.1, dtype="auto"
    )
    rows = list(made["test"])
    fit = {4.0, 16.0} if name == "needle_multivalue" else {0.5, 4.0, 16.0}
    assert {row["windows"] for row in rows} - {0.5} == fit - {0.5}
    assert len(rows) % 3 == 0 and len({row["prompt"] for row in rows}) == len(rows)
    assert {row["pairs"] for row in rows} == ({4, 8} if name == "mqar" else {0})
    for row in rows:
        assert row["distance"] == round(32 * row["windows"]) and row["task"] == name
        ids = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        assert row["distance"] < len(ids) <= 1280 - 24
        word = re.escape(row["answer"].split()[0])
        rests = [row["prompt"][match.end() :] for match in re.finditer(rf" {word}(?![a-z])", row["prompt"])]
        lengths = [len(tokenizer(rest, add_special_tokens=False)["input_ids"]) for rest in rests]
        assert any(abs(length - row["distance"]) <= 14 for length in lengths)


def test_seed_and_missing_model(utils: ModuleType) -> None:
    options = {"pretrained": TEACHER, "distances": [2], "prompts": 2}
    one, again, other = (list(utils.needle(**options, seed=seed)["test"]) for seed in (0, 0, 1))
    assert one == again != other
    with pytest.raises(ValueError, match="--model_args pretrained"):
        utils.needle()
    with pytest.raises(ValueError, match="nothing fits"):
        utils.needle(pretrained=TEACHER, distances=[1000])


def test_score(utils: ModuleType) -> None:
    doc = {"answer": " two words", "windows": 4.0, "pairs": 0}
    assert utils.process_results(doc, [" two words and more"]) == {"exact_match": 1.0, "exact_match_x4": 1.0}
    assert utils.process_results(doc, ["two word"]) == {"exact_match": 0.0, "exact_match_x4": 0.0}
    assert utils.process_results(doc, ["two wordsmiths"]) == {"exact_match": 0.0, "exact_match_x4": 0.0}
    assert utils.process_results(doc, ["two words; three"]) == {"exact_match": 1.0, "exact_match_x4": 1.0}
    assert utils.process_results(doc | {"windows": 3.0}, [" one two words"]) == {"exact_match": 0.0}
    pairs = utils.process_results(doc | {"windows": 3.0, "pairs": 64}, ["two words"])
    assert pairs == {"exact_match": 1.0, "exact_match_p64": 1.0}


def test_documents_from_a_text_of_ones_own(utils: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("zebra quagga okapi " * 2000, encoding="utf-8")
    options = {"pretrained": TEACHER, "distances": [4], "prompts": 2}
    own = list(utils.needle(**options, text=str(tmp_path / "mine.txt"))["test"])
    assert all("quagga okapi" in row["prompt"] for row in own)
    assert not any("quagga" in row["prompt"] for row in utils.needle(**options)["test"])
    with pytest.raises(ValueError, match="text nowhere.txt: cannot be read as UTF-8 text"):
        utils.needle(**options, text="nowhere.txt")


def test_every_number_of_pairs_is_asked(utils: ModuleType) -> None:
    rows = list(utils.mqar(tokenizer=TEACHER, context=4096, distances=[32], prompts=1)["test"])
    assert {row["pairs"] for row in rows} == set(utils.PAIRS)


def test_without_the_harness_a_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else find(name, *rest)
    )
    with pytest.raises(InputError, match=r"pip install 'nha-convert\[eval\]'"):
        check_tasks(["arc_easy"])
    with pytest.raises(InputError, match="--tasks arc_easy,nha_recall: lm-evaluation-harness is not installed"):
        evaluate_checkpoint(Path("nowhere"), tasks=["arc_easy", "nha_recall"])


@needs_harness
@pytest.mark.slow
def test_the_harness_gives_the_models_own_answers(utils: ModuleType) -> None:
    """Our needle through the harness, on a model in memory: the hits that generating from the documents has."""
    with pytest.raises(InputError, match="did you mean `nha_recall`"):
        check_tasks(["nha_recal"])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(TEACHER), AutoTokenizer.from_pretrained(TEACHER)
    model.generation_config.do_sample = True
    found = run_harness(model, tokenizer, ["nha_needle", "nha_copy"], window=64, limit=48)
    assert model.generation_config.do_sample and not model.training
    rows = list(utils.needle(pretrained=TEACHER, tokenizer=tokenizer)["test"])[:48]
    hits = []
    for row in rows:
        ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)
        hits.append(utils.process_results(row, [tokenizer.decode(out[0, ids.shape[1] :])])["exact_match"])
    assert found["nha_needle"]["exact_match"] == pytest.approx(sum(hits) / 48)
    assert found["nha_needle"]["exact_match"] > 0.5
    assert set(found["nha_copy"]) >= {"exact_match", "exact_match_stderr", "exact_match_x0.5"}


@needs_harness
@pytest.mark.slow
def test_the_command_takes_the_folder(tmp_path: Path) -> None:
    """`lm_eval --include_path` on the folder, with the settings that the documentation names."""
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={TEACHER}"]
    command += ["--tasks", "nha_recall", "--include_path", str(task_folder()), "--device", "cpu", "--batch_size", "4"]
    command += ["--metadata", json.dumps({"window": 64, "distances": [1, 2], "prompts": 2, "pairs": [4]})]
    root = Path(__file__).resolve().parents[2]
    paths = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, "--output_path", str(tmp_path / "results")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (tmp_path / "results").rglob("results_*.json")
    results = json.loads(file.read_text(encoding="utf-8"))["results"]
    assert {f"nha_{name}" for name in TASKS} <= set(results)
    assert results["nha_needle"]["exact_match_x1,none"] >= 0.5
