"""Bad input, as a stranger types it: exit code 2, one clear line per problem with the fix, nothing written."""

import shutil
from pathlib import Path

import pytest
import torch
from cli_process import in_a_process as nha_convert
from safetensors.torch import save_file
from transformers import GPT2Config


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


@pytest.fixture
def place(tmp_path: Path, pico_llama: Path) -> Path:
    """A folder with a good model, a truncated one, a GPT-2, a used output folder and recipes."""
    shutil.copytree(pico_llama, tmp_path / "model")
    shutil.copytree(pico_llama, tmp_path / "truncated")
    weights = tmp_path / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    (tmp_path / "gpt2").mkdir()
    GPT2Config(n_layer=1, n_head=2, n_embd=8).save_pretrained(tmp_path / "gpt2")
    save_file({"wte.weight": torch.zeros(2, 2)}, tmp_path / "gpt2" / "model.safetensors")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").write_text("mine")
    recipe = """\
model: model
output: out
nha: {{window: 8, slots: 4{nha}}}
data: {{sources: [{{source: stdlib}}]}}
stages:
  - {{kind: align, tokens: 256, sequence_length: 64, batch_size: 1}}
evaluate: {{sequence_length: 64}}
"""
    (tmp_path / "good.yaml").write_text(recipe.format(nha=""))
    (tmp_path / "typo.yaml").write_text(recipe.format(nha=", sinkz: 2"))
    return tmp_path


RUN_AND_SWAP = [
    (["run", "typo.yaml"], "typo.yaml:3: nha.sinkz: unknown key, did you mean `nha.sinks`?"),
    (["run", "good.yaml", "--set", "nha.slotz=1"], "did you mean `nha.slots`?"),
    (["run", "good.yaml", "--set", "model=nothing-here"], "no such model folder; give a folder with config.json"),
    (["run", "./nothing-here"], "no shipped recipe, recipe file, model folder or Hub id has this name"),
    (["run", "good.yaml", "--set", "model=truncated"], "model.safetensors: is truncated"),
    (["run", "good.yaml", "--set", "model=gpt2"], "models of type gpt2 cannot be converted; supported: llama"),
    (["run", "gpt2"], "models of type gpt2 cannot be converted; supported: llama"),
    (["run", "good.yaml", "--set", "nha.window=-1"], "nha.window: an integer >= 0, `full`, or a list"),
    (["run", "good.yaml", "--set", "nha.slots=0"], "nha.slots: a number >= 1 is needed, found 0"),
    (["run", "good.yaml", "--out", "used"], "used: is not empty; choose another folder with --out DIR"),
    (["run", "good.yaml", "--out", "used", "--resume"], "used: cannot be resumed, it holds no recipe.yaml"),
    (["swap", "nothing-here", "out"], "no such model folder; give a folder with config.json"),
    (["swap", "truncated", "out"], "model.safetensors: is truncated"),
    (["swap", "gpt2", "out"], "models of type gpt2 cannot be converted; supported: llama"),
    (["swap", "model", "out", "--set", "nha.window=-1"], "nha.window: an integer >= 0, `full`, or a list"),
    (["swap", "model", "out", "--set", "nha.slots=0"], "nha.slots: a number >= 1 is needed, found 0"),
    (["swap", "model", "out", "--set", "nha.slotz=1"], "did you mean `nha.slots`?"),
    (["swap", "model", "out", "--set", "stages=[]"], "reads the settings under `nha`, `seed` and `search` alone"),
    (["swap", "model", "good.yaml/out"], "good.yaml is not a folder that you may write to"),
    (["swap", "model", "used"], "used: exists and is not an empty folder; choose another"),
    (["plan", "good.yaml", "--set", "nha.window=[8]"], "the model has 2 layers and needs one entry for each, found 1"),
    (["recipes", "show", "dmeo"], "did you mean `demo`?"),
    (["recipes", "cp", "demo", "good.yaml"], "good.yaml: exists; choose another name"),
    (["eval", "nothing-here"], "nothing-here: no checkpoint folder"),
    (["eval", "truncated"], "model.safetensors: is truncated"),
    (["verify", "truncated"], "model.safetensors: is truncated"),
    (["generate", "truncated", "--prompt", "x"], "model.safetensors: is truncated"),
    (["recipes", "cp", "demo", "good.yaml/x.yaml"], "cannot be written"),
    (["run", "good.yaml", "--set", "runtime.device=cuda:9"], "this machine has no cuda:9"),
    (["verify", "used"], "used: no checkpoint folder"),
    (["generate", "used", "--prompt", "x"], "used: no checkpoint folder"),
    (["export", "used", "out"], "used: no recipe.yaml, so this is no run folder"),
    (["report", "used"], "used: no recipe.yaml, so this is no run folder"),
]


@pytest.mark.parametrize(("arguments", "said"), RUN_AND_SWAP, ids=[" ".join(one) for one, _ in RUN_AND_SWAP])
def test_refusal(place: Path, arguments: list[str], said: str) -> None:
    before = contents(place)
    answer = nha_convert(*arguments, cwd=place)
    assert answer.returncode == 2, answer.stderr
    lines = answer.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and said in lines[0], answer.stderr
    assert answer.stdout == ""
    assert contents(place) == before


def test_the_same_recipe_passes_when_nothing_is_wrong(place: Path) -> None:
    """The refusals above are not refusals of everything."""
    before = contents(place)
    answer = nha_convert("run", "good.yaml", "--dry-run", cwd=place)
    assert answer.returncode == 0, answer.stderr
    assert "align" in answer.stdout
    assert contents(place) == before


def test_several_mistakes_are_named_at_once(place: Path) -> None:
    answer = nha_convert("run", "typo.yaml", "--set", "nha.window=-1", "--set", "nha.slots=0", cwd=place)
    assert answer.returncode == 2
    assert len(answer.stderr.splitlines()) == 3


@pytest.mark.parametrize("arguments", [["run"], ["run", "demo", "--bogus"], ["nonsense"], ["generate", "model"]])
def test_wrong_usage(place: Path, arguments: list[str]) -> None:
    answer = nha_convert(*arguments, cwd=place)
    assert answer.returncode == 2
    assert "Usage:" in answer.stderr and "Traceback" not in answer.stderr
