"""lm-evaluation-harness on an exported folder with local tasks: padded batches give what single rows give, and we.

Slow, and skipped where lm_eval is not installed: `pip install -e '.[eval]'`, then `pytest -m slow tests/serving`.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.serving.served import PROMPTS, alone

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.slow

CHOICES = [" self", " None\n", " the name of the file", "x"]
TASKS = {
    "nha_choice": """
output_type: multiple_choice
target_delimiter: ""
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}]
""",
    "nha_write": """
output_type: generate_until
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 16, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}
PROGRAM = """
import json, runpy
sys.argv[0] = "lm_eval"
try:
    runpy.run_module("lm_eval", run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
used = [name for name in sys.modules if name.startswith("transformers_modules.") and name.endswith(".modeling_nha")]
print("\\n" + json.dumps(used))
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two tasks on the same eight documents."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "documents.jsonl"
    documents = [
        {"text": text, "choices": CHOICES, "answer": index % len(CHOICES)} for index, text in enumerate(PROMPTS)
    ]
    data.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
    for name, rest in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(f'{head}doc_to_text: "{{{{text}}}}"{rest}', encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def samples(served_folder: Path, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """Batch size -> task -> what lm_eval logged of each document, in order."""
    found: dict[int, Any] = {}
    for batch in (1, 8):
        out = tmp_path_factory.mktemp(f"batch{batch}")
        options = ["--model", "hf", "--model_args", f"pretrained={served_folder},trust_remote_code=True"]
        options += ["--tasks", ",".join(TASKS), "--include_path", tasks, "--batch_size", batch, "--device", "cpu"]
        used = alone(PROGRAM, *options, "--log_samples", "--output_path", out / "results", cwd=out)
        assert len(used) == 1  # the folder's own code ran
        found[batch] = {}
        for name in TASKS:
            (path,) = (out / "results").rglob(f"samples_{name}_*.jsonl")
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            found[batch][name] = sorted(lines, key=lambda line: line["doc_id"])
        assert [len(rows) for rows in found[batch].values()] == [len(PROMPTS)] * len(TASKS)
    return found


def likelihoods(rows: list[Any]) -> torch.Tensor:
    """[documents, choices]"""
    return torch.tensor([[float(answer[0]) for answer in row["filtered_resps"]] for row in rows])


def texts(rows: list[Any]) -> list[str]:
    return [row["filtered_resps"][0] for row in rows]


def test_batches_equal_single_rows(samples: dict[int, Any]) -> None:
    alone_, batched = (likelihoods(samples[batch]["nha_choice"]) for batch in (1, 8))
    torch.testing.assert_close(batched, alone_, rtol=1e-5, atol=1e-4)
    assert texts(samples[8]["nha_write"]) == texts(samples[1]["nha_write"])


def test_likelihoods_are_the_models(samples: dict[int, Any], served_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(served_folder)
    tokenizer = AutoTokenizer.from_pretrained(served_folder)
    wanted = torch.zeros(len(PROMPTS), len(CHOICES))
    for row, text in enumerate(PROMPTS):
        start = len(tokenizer(text.rstrip())["input_ids"])  # lm_eval counts trailing spaces to the answer
        for column, choice in enumerate(CHOICES):
            ids = tokenizer(text + choice, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                scores = model(ids, use_cache=False).logits[0].log_softmax(-1)
            wanted[row, column] = scores[start - 1 : -1].gather(1, ids[0, start:, None]).sum()
    found = likelihoods(samples[8]["nha_choice"])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-3)
    assert found.std() > 1


def test_generated_text_is_the_models(samples: dict[int, Any], served_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(served_folder)
    tokenizer = AutoTokenizer.from_pretrained(served_folder)
    wanted = []
    for text in PROMPTS:
        inputs = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            out = model.generate(**inputs, do_sample=False, max_new_tokens=16)
        new = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        wanted.append(new.split("\n\n")[0])
    assert texts(samples[8]["nha_write"]) == wanted
    assert len(set(wanted)) > len(wanted) // 2
