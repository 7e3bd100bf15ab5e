"""Every shipped recipe: its plan on the public model's shape, its head, and two steps of each of its stages."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from stages import train
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from nha_convert.gpus import find_machine
from nha_convert.modeling.attention_nha import nha_layers
from nha_convert.plan import make_plan
from nha_convert.plan_memory import PARTS
from nha_convert.plan_time import stage_time
from nha_convert.recipe import Recipe, embedded_teacher, list_recipes, load_recipe, recipe_path
from tools import recipe_costs
from tools.recipe_costs import PUBLIC, cost_lines, cost_place, on_public_shape, same

LENGTH, ROWS, STEPS = 96, 2, 2
SHRUNK = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
SHRUNK |= {"num_key_value_heads": 2, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2}
SHRUNK |= {"moe_intermediate_size": 32}


@pytest.fixture(params=list_recipes())
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def shrunk_model(recipe: Recipe, folder: Path) -> Path:
    """A random model of the public one's configuration, made small; the embedded teacher is small enough itself."""
    if recipe.model == "embedded":
        return embedded_teacher()
    public = PUBLIC[recipe.model]
    layers = int(str(recipe.nha.full_attention_layers).removeprefix("every:"))  # the last one stays full
    tokenizer = AutoTokenizer.from_pretrained(embedded_teacher())
    ids = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    small = {key: value for key, value in SHRUNK.items() if key in public}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(**{**public, **small, **ids, "num_hidden_layers": layers})
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def shrunk(name: str, text: Path, folder: Path) -> Recipe:
    """A shipped recipe as it is, but for its model, its rows, two steps a stage, and a local file for its text."""
    path = str(recipe_path(name))
    recipe = load_recipe(path)
    sources = [
        source.model_dump(include={"source", "name", "weight"})
        | ({} if source.source == "recall" else {"source": "text", "path": str(text), "name": source.label})
        for source in recipe.data.sources
    ]
    changes = [
        f"model={json.dumps(str(shrunk_model(recipe, folder)))}",
        f"data.sources={json.dumps(sources)}",
        f"evaluate.sequence_length={LENGTH}",
        *("data.workers=1", "runtime.device=cpu"),
    ]
    for index in range(len(recipe.stages)):
        sizes = {"sequence_length": LENGTH, "batch_size": ROWS, "tokens": STEPS * ROWS * LENGTH}
        changes += [f"stages.{index}.{key}={value}" for key, value in sizes.items()]
    return load_recipe(path, changes)


def no_cost(recipe: Recipe, index: int) -> dict[str, int]:
    """In place of `stage_cost`, which runs a step of each stage."""
    return dict.fromkeys(("trained_parameters", "trained_base_parameters", *PARTS), 0)


def test_plan_on_the_public_shape(name: str, tmp_path: Path) -> None:
    recipe = on_public_shape(name, tmp_path / "model")
    processes = re.findall(r"--nproc_per_node ([0-9]+)", recipe_path(name).read_text(encoding="utf-8"))
    for number in map(int, processes):  # those of the head's commands
        assert make_plan(recipe, no_cost, stage_time, find_machine("H100", number))["hours"] > 0
    plan = make_plan(recipe, no_cost)
    exact = [row for row in plan["layers"] if row["attention"] == "nha"]
    wanted = {"demo": 1, "align-only": 0, "all-layers": 0, "paper-llama-3-8b": 4}.get(name, len(plan["layers"]) // 4)
    assert len(plan["layers"]) - len(exact) == wanted
    assert [row["tokens"] for row in plan["stages"]] == [stage.tokens for stage in recipe.stages]
    warned = [note for note in plan["notes"] if re.search("see nothing|fewer than|most of the cache", note)]
    assert warned == []


def test_the_head_says_what_the_plan_says(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the memory, for which a step of each stage has to be run."""
    lines = recipe_path(name).read_text(encoding="utf-8").splitlines()
    monkeypatch.setattr(recipe_costs, "stage_cost", no_cost)
    wanted = cost_lines(on_public_shape(name, tmp_path / "model"), find_machine())
    memory = re.compile(r"; at most .*|(, had it the memory)?\.$")
    assert same(*([memory.sub("", line) for line in part] for part in (lines[cost_place(lines, name)], wanted)))


@pytest.mark.slow
def test_the_head_is_up_to_date(name: str) -> None:
    assert recipe_costs.main([name, "--check"]) == 0


def test_a_head_that_is_out_of_date_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "demo.yaml"
    text = recipe_path("demo").read_text(encoding="utf-8")
    copy.write_text(re.sub(r"# Costs: .*", "# Costs: 1M tokens", text), encoding="utf-8")
    monkeypatch.setattr(recipe_costs, "recipe_path", lambda name: copy)
    monkeypatch.setattr(recipe_costs, "stage_cost", no_cost)
    before = copy.read_text(encoding="utf-8")
    assert recipe_costs.main(["demo", "--check"]) == 1
    assert copy.read_text(encoding="utf-8") == before
    assert recipe_costs.main(["demo"]) == 0
    after = copy.read_text(encoding="utf-8")
    assert "# Costs: 600k tokens in 294 optimizer steps" in after
    assert after.split("# Run:")[1] == text.split("# Run:")[1]
    assert recipe_costs.main(["demo", "--check"]) == 0


@pytest.mark.parametrize(
    ("found", "wanted", "as_good"),
    [
        ("1,000 steps, 2.00 GiB", "1,010 steps, 1.99 GiB", True),
        ("1,000 steps, 2.00 GiB", "1,030 steps, 2.00 GiB", False),
        ("1,000 steps, 2.00 GiB", "1,000 steps, 2.00 MiB", False),
    ],
)
def test_when_heads_say_the_same(found: str, wanted: str, as_good: bool) -> None:
    assert same([found], [wanted]) == as_good


def test_two_steps_of_every_stage(name: str, text: Path, tmp_path: Path) -> None:
    recipe = shrunk(name, text, tmp_path / "model")
    plan = make_plan(recipe, no_cost)
    before = dict(AutoModelForCausalLM.from_pretrained(recipe.model, dtype=recipe.runtime.dtype).state_dict())
    model, summaries = train(Path(recipe.model), tmp_path / "run", recipe)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [summary["steps"] for summary in summaries] == [stage.steps for stage in recipe.stages]
    assert all(summary["steps"] == STEPS and summary["trained_parameters"] > 0 for summary in summaries)
    assert rows and all(torch.isfinite(torch.tensor(row["loss"])) for row in rows)
    gates = {index for index, _ in nha_layers(model)}
    assert gates == {row["layer"] for row in plan["layers"] if row["attention"] == "nha"}
    check_what_changed(recipe, before, model)


def check_what_changed(recipe: Recipe, before: dict[str, torch.Tensor], model: Any) -> None:
    """Base tensors that no stage may train are as they were; some of those that one trains are not."""
    after = model.state_dict()
    learn = {name for name in before for stage in recipe.stages if stage.may_change(name)}
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed <= learn
    assert bool(changed) == bool(learn)
