"""Recipes: the shipped ones are valid and documented, every mistake is named with its place and its fix."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nha_convert.errors import InputError
from nha_convert.families import FAMILIES
from nha_convert.plan import dimensions_of
from nha_convert.preflight import check_inputs
from nha_convert.recipe import (
    Recipe,
    dump_recipe,
    embedded_teacher,
    evaluate_settings,
    list_recipes,
    load_recipe,
    parse_recipe,
    recipe_path,
    recipes_folder,
    swap_recipe,
)
from nha_convert.recipe_choice import BY_SIZE, Sized, choose, choose_for
from nha_convert.recipes_app import recipes_app
from nha_convert.settings_types import PAPER_LAYER
from tools.recipe_costs import PUBLIC

SMALL = """\
model: embedded
data: {sources: [{source: stdlib}]}
stages:
  - {kind: align, tokens: 400k}
  - {kind: distill, tokens: 8192, sequence_length: 64, batch_size: 3}
"""


def small(*overrides: str) -> Recipe:
    return parse_recipe(SMALL, "small.yaml", list(overrides))


def complaint(text: str, *overrides: str) -> list[str]:
    with pytest.raises(InputError) as caught:
        parse_recipe(text, "my.yaml", list(overrides))
    return str(caught.value).splitlines()


# ---- shipped -------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", list_recipes())
def test_shipped_recipe(name: str) -> None:
    recipe = load_recipe(name)
    assert parse_recipe(dump_recipe(recipe), "again.yaml") == recipe
    head = [line for line in recipe_path(name).read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    for word in ("Needs:", "Costs:", "Run:"):
        assert any(word in line for line in head), f"{name}: the header does not say what it {word}"
    assert any(
        line.split()[:5] in (["#", "Run:", "nha-convert", "run", one] for one in (name, recipe.model)) for line in head
    )


def test_shipped_names() -> None:
    named = {"llama-3.2-1b", "llama-3.1-8b", "qwen2.5-0.5b", "qwen2.5-7b", "qwen3-0.6b", "qwen3-8b"}
    named |= {"demo", "align-only", "all-layers", "long-context", "paper-llama-3-8b"}
    assert named | {one.name for one in BY_SIZE} == set(list_recipes())
    assert embedded_teacher() == recipes_folder() / "teacher"


def test_recipe_loads_no_torch() -> None:
    code = "import sys; from nha_convert.recipe import load_recipe; load_recipe('demo'); print('torch' in sys.modules)"
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=recipes_folder().parent, capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "False"


# ---- the recipe of a model -----------------------------------------------------------------------
@pytest.mark.parametrize("sized", BY_SIZE, ids=lambda sized: sized.name)
def test_recipes_are_chosen_by_the_size_of_their_model(sized: Sized) -> None:
    model = load_recipe(sized.name).model
    sizes = dimensions_of(model, PUBLIC[model])
    assert (sizes.family, sizes.parameters) == (sized.family, sized.parameters)
    assert choose(model, sizes.family, sizes.parameters).recipe == sized.name


def test_every_family_has_a_recipe_that_is_chosen() -> None:
    assert {one.family for one in BY_SIZE} == set(FAMILIES)


@pytest.mark.parametrize(
    ("family", "smaller", "larger"),
    [
        ("llama", "llama-3.2-1b", "llama-3.1-8b"),
        ("qwen2", "qwen2.5-0.5b", "qwen2.5-7b"),
        ("qwen3", "qwen3-0.6b", "qwen3-8b"),
    ],
)
def test_the_border_is_where_both_ratios_are_equal(family: str, smaller: str, larger: str) -> None:
    below, above = (next(one.parameters for one in BY_SIZE if one.name == name) for name in (smaller, larger))
    border = math.isqrt(below * above)
    for parameters, name in {1: smaller, border: smaller, border + 1: larger, 10**12: larger}.items():
        assert choose("x", family, parameters).recipe == name


def test_of_two_as_near_the_smaller_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = (Sized("large", "llama", 4 * 10**9), Sized("small", "llama", 10**9))
    monkeypatch.setattr("nha_convert.recipe_choice.BY_SIZE", pair)
    assert choose("x", "llama", 2 * 10**9).recipe == "small"


def test_a_family_without_recipe() -> None:
    with pytest.raises(InputError, match="x: no shipped recipe is for models of type gemma; copy one"):
        choose("x", "gemma", 10**9)


def test_the_choice_is_shown(pico_models: dict[str, Path]) -> None:
    folder = str(pico_models["qwen3"])
    shown = CliRunner().invoke(recipes_app, ["show", folder]).output
    first, _, rest = shown.partition("\n")
    assert first == f"# {choose_for(folder).reason}"
    assert first.endswith("takes qwen3-0.6b: nearest in size of qwen3-0.6b, qwen3-8b")
    assert parse_recipe(rest, "shown.yaml") == parse_recipe(shown, "shown.yaml") == load_recipe(folder)


def test_a_chosen_recipe_that_is_too_long_for_the_model(pico_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"stages.0.sequence_length: 2048 is beyond the 512 positions"):
        check_inputs(load_recipe(str(pico_llama)), tmp_path / "run")


# ---- values --------------------------------------------------------------------------------------
def test_defaults_and_steps() -> None:
    recipe = small()
    assert recipe.output == "runs/small"
    assert (recipe.stages[0].tokens, recipe.stages[0].steps) == (400_000, 98)  # 97.66 batches of 8 x 512
    assert recipe.stages[1].steps == 43  # 8192 / 192 = 42.67
    assert small("stages.0.tokens=4096").stages[0].steps == 1


@pytest.mark.parametrize(
    ("given", "tokens"), [("20M", 20_000_000), ("1.5k", 1500), ("1B", 10**9), ("7", 7), ("1_000", 1000), ("2e3", 2000)]
)
def test_token_counts(given: str, tokens: int) -> None:
    if given == "2e3":
        assert complaint(SMALL, f"stages.align.tokens={given}")  # YAML reads 2e3 as text; the form is 2k
    else:
        assert small(f"stages.align.tokens={given}").stages[0].tokens == tokens


def test_windows() -> None:
    nha = small("nha.window=[64, full, 0]", "nha.full_attention_layers=[2]").nha
    assert nha.windows(3) == [64, None, None]
    assert small("nha.full_attention_layers=every:4").nha.windows(9) == [64, 64, 64, None] * 2 + [64]
    assert small("nha.window=full").nha.windows(2) == [None, None]
    with pytest.raises(InputError, match="has 4 layers .* found 3"):
        nha.windows(4)
    with pytest.raises(InputError, match=r"layers 0 to 1 exist in this model, found \[2\]"):
        small("nha.full_attention_layers=[0, 2]").nha.windows(2)


def test_the_batch_of_a_stage_in_tokens() -> None:
    stage = small("stages.align.batch_tokens=64k", "stages.align.sequence_length=2048").stages[0]
    assert (stage.batch_size, stage.steps) == (31, 7)  # 64,000 / 2,048 = 31.25; 400,000 / (31 * 2,048) = 6.3
    again = parse_recipe(dump_recipe(small("stages.align.batch_tokens=64k")), "again.yaml")
    assert again.stages[0].batch_size == 125
    stage.batch_size = 7
    assert stage.batch_size == 7


def test_what_a_stage_trains() -> None:
    assert small().stages[0].train == ["gates"] and small().stages[1].train == ["gates", "lora"]
    assert small("stages.align.train=qkvo").stages[0].train == ["qkvo"]
    assert small("stages.align.train=[lora, gates, lora]").stages[0].train == ["gates", "lora"]


def test_when_a_teacher_of_its_own_is_needed() -> None:
    def needed(*stages: str) -> list[bool]:
        recipe = small(f"stages=[{', '.join(f'{{tokens: 1, {stage}}}' for stage in stages)}]")
        return [recipe.needs_teacher(index) for index in range(len(recipe.stages))]

    assert needed("kind: align", "kind: hidden", "kind: distill", "kind: finetune") == [False, False, True, False]
    assert needed("kind: align, train: [gates, qkvo]", "kind: align") == [True, True]
    assert needed("kind: finetune", "kind: distill, losses: [{function: ce}]") == [False, False]
    assert needed("kind: distill, train: gates", "kind: distill, train: all") == [False, True]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["stages.distill.train=all"], "set runtime.dtype: float32 and stages.1.precision: bfloat16"),
        (["stages.align.precision=float32"], "stages.0.precision is float32 with weights of bfloat16"),
    ],
)
def test_precisions_that_do_not_fit_the_weights(overrides: list[str], said: str) -> None:
    assert said in "\n".join(complaint(SMALL, "runtime.dtype=bfloat16", *overrides))
    small("runtime.dtype=float32", *overrides)


# ---- overrides -----------------------------------------------------------------------------------
def test_overrides() -> None:
    recipe = small(
        "output=a=b",  # '=' inside a value
        "nha.window=[32, full]",
        "stages.distill.lora.rank=2",  # an entry by its kind, through a mapping that the text does not have
        "stages.0.name=first",
        "data.sources.stdlib.weight=0.5",
        "nha.sinks=9",
        "~nha.sinks",
        "~stages.1",
    )
    assert recipe.output == "a=b"
    assert recipe.nha.window == [32, "full"]
    assert [stage.name for stage in recipe.stages] == ["first"]
    assert recipe.data.sources[0].weight == 0.5
    assert recipe.nha.sinks == 4
    assert small("stages.distill.lora.rank=2").stages[1].lora.rank == 2


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("nha.slotz=3", "nha.slotz: unknown key, did you mean `nha.slots`?"),
        ("slots=3", "slots: unknown key, did you mean `nha.slots`?"),
        ("nah.window=3", "nah: unknown key, did you mean `nha`?"),
        ("stages.distill.lora.rnak=3", "did you mean `stages.1.lora.rank`?"),
        ("stages.distill.kl_weight=1", "stages.1.kl_weight: unknown key; allowed here: "),
        ("stages.align.losses=[]", "stages.0.losses: unknown key"),
        ("stages.distill.losses=[]", "stages.1.losses: a list of at least 1 entries is needed"),
        (
            "stages.distill.losses=[{function: klx}]",
            "did you mean `kl`?; allowed: kl, reverse_kl, ce, hidden, attention",
        ),
        ("stages.distill.losses=[{function: ce, wieght: 1}]", "did you mean `stages.1.losses.0.weight`?"),
        ("stages.distill.losses=[{function: ce, weight: 0}]", "losses.0.weight: a number > 0 is needed"),
        ("stages.distill.losses=[{function: ce, temperature: 2}]", "temperature is read by kl and reverse_kl alone"),
        ("stages.distill.losses=[{function: ce}, {function: ce}]", "ce stands twice; keep one entry"),
        ("stages.align.train=all", "alignment compares attention alone, found all; allowed: gates, lora, qkvo"),
        ("stages.distill.train=[lora, all]", "keep one of lora, qkvo, no_mlp, all"),
        ("stages.distill.train=loar", "found 'loar', did you mean `lora`?"),
        ("stages.align.lora={rank: 3}", "lora is set, but train is ['gates']; add `lora` to train"),
        ("stages.distill={kind: distill, tokens: 1, train: lora, gate_learning_rate: 1}", "add `gates` or remove"),
        ("stages.align.decay=0.2", "decay is read by `schedule: wsd` alone, found schedule cosine"),
        ("stages.align={kind: align, tokens: 1, schedule: wsd, warmup: 0.5, decay: 0.6}", "more than 1 together"),
        ("stages.align.schedule=cosin", "did you mean `cosine`?; allowed: cosine, wsd, constant"),
        ("stages.distill.batch_tokens=64k", "batch_size 3 and batch_tokens 64000 say the same thing; keep one"),
        ("stages.align.batch_tokens=100", "batch_tokens is 100, fewer than one row of sequence_length = 512"),
        (
            "stages.align={kind: align, tokens: 1, windows: 8, random_windows: [8]}",
            "windows say the same thing; keep one",
        ),
        ("stages.align.random_windows=[full]", "stages.0.random_windows.0: an integer is needed, found 'full'"),
        ("stages.align.precision=half", "stages.0.precision: found 'half'; allowed: float32, bfloat16"),
        ("nha.slots=0", "nha.slots: a number >= 1 is needed, found 0"),
        ("nha.slots=true", "a number is needed, found true"),
        ("nha.window=-1", "nha.window: an integer >= 0, `full`, or a list"),
        ("nha.window=[8, -1]", "found -1"),
        ("nha.tau=.inf", "a finite number is needed"),
        ("nha.gate_init=sprad", "did you mean `spread`?"),
        ("nha.full_attention_layers=auto:0", "`auto:N` or `auto:N:METHOD` with N >= 1"),
        ("stages.0.kind=algin", "stages.0.kind: 'algin' is unknown, did you mean `align`?"),
        ("seed=x", "an integer is needed, found 'x'"),
        ("runtime.device=gpu", "one of auto, cpu, mps, cuda or cuda:N is needed"),
        ("nha=3", "a mapping with the keys"),
        ("data.sources=[{source: recall}]", "`recall` documents are filled with text"),
        ("data.sources=[{source: text}]", "needs `path`"),
        ("stages.distill.lora.targets=[]", "a list of at least 1 entries is needed"),
        ("~model", "model: is missing; add it, with a Hub id"),
        ("~nha.slotz", "did you mean `nha.slots`?"),
        ("foo", "the form is `a.b=value`"),
        ("~nha.slots=3", "the form is `a.b=value`"),
        ("nha..slots=3", "the form is `a.b=value`"),
        ("stages.7.tokens=3", "entries: 0 (align), 1 (distill)"),
        ("model.x=3", "`model` is 'embedded' and has no keys inside"),
        ("nha.window=[", "is not valid YAML"),
    ],
)
def test_a_wrong_override_names_itself_and_the_fix(override: str, said: str) -> None:
    lines = complaint(SMALL, override)
    assert len(lines) == 1
    assert lines[0].startswith(f"--set {override}: ")
    assert said in lines[0]


def test_commands_refuse_settings_they_do_not_read(tmp_path: Path) -> None:
    recipe = swap_recipe(["nha.slots=8", "seed=3"])
    assert (recipe.nha.slots, recipe.seed) == (8, 3)
    assert evaluate_settings(tmp_path, ["evaluate.tokens=2k"]).tokens == 2000
    with pytest.raises(InputError, match="`swap` reads the settings under `nha`, `seed` and `search` alone"):
        swap_recipe(["evaluate.tokens=4"])
    with pytest.raises(InputError, match="did you mean `evaluate.tokens`"):
        evaluate_settings(tmp_path, ["evaluate.token=4"])


# ---- mistakes in files ---------------------------------------------------------------------------
def test_every_problem_at_once_with_its_line() -> None:
    lines = complaint(
        """\
model: embedded
nha:
  slotz: 3
  window: -1
  tau: 1
  tau: 2
data: {sources: [{source: stdlb}]}
stages:
  - {kind: align}
  - {tokens: 3}
evalute: {}
""",
        "nha.sinkz=1",
    )
    said = "\n".join(lines)
    for place, words in {
        "my.yaml:3": "nha.slotz: unknown key, did you mean `nha.slots`?",
        "my.yaml:4": "nha.window: an integer >= 0",
        "my.yaml:6": "nha.tau: stands twice",
        "my.yaml:7": "found 'stdlb', did you mean `stdlib`?",
        "my.yaml:9": "stages.0.tokens: is missing",
        "my.yaml:10": "stages.1: `kind` is missing; allowed: align, hidden, distill, finetune",
        "my.yaml:11": "evalute: unknown key, did you mean `evaluate`?",
        "--set nha.sinkz=1": "nha.sinkz: unknown key, did you mean `nha.sinks`?",
    }.items():
        assert re.search(f"^{re.escape(place)}: .*{re.escape(words)}", said, re.MULTILINE), (place, said)
    assert len(lines) == 8


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1", "my.yaml:1: not valid YAML"),
        ("- 1", "my.yaml: a mapping of settings is needed, found list"),
        ("", "a mapping of settings is needed, found NoneType"),
        ("model: embedded", "data: is missing; add it, such as"),
    ],
)
def test_wrong_files(text: str, said: str) -> None:
    assert said in "\n".join(complaint(text))


# ---- names ---------------------------------------------------------------------------------------
def test_names(tmp_path: Path, pico_models: dict[str, Path]) -> None:
    recipe = load_recipe(str(pico_models["qwen2_tied"]))
    family = load_recipe("qwen2.5-0.5b")
    assert recipe.model == str(pico_models["qwen2_tied"])
    assert recipe.output == "runs/qwen2_tied"
    assert recipe.stages == family.stages
    mine = tmp_path / "mine.yaml"
    mine.write_text(SMALL)
    assert load_recipe(str(mine)).output == "runs/mine"
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(dump_recipe(small()))
    assert load_recipe(str(run)).output == str(run)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("dmeo", "did you mean `demo`?"),
        ("missing.yaml", "no such recipe file; shipped recipes: "),
        ("/no/such/folder", "no shipped recipe, recipe file, model folder or Hub id has this name"),
        ("no-such/model", "the Hub gave no config.json"),
    ],
)
def test_unknown_names(name: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe(name)
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


# ---- the paper's layer ---------------------------------------------------------------------------
def papers(recipe: Recipe) -> dict[str, object]:
    return {name: getattr(recipe.nha, name) for name in PAPER_LAYER}


def test_the_papers_layer_is_one_setting_away() -> None:
    assert papers(load_recipe("paper-llama-3-8b")) == PAPER_LAYER
    assert papers(load_recipe("demo")) != PAPER_LAYER
    paper = load_recipe("demo", ["nha.layer=paper"])
    assert papers(paper) == PAPER_LAYER and paper.nha.window == load_recipe("demo").nha.window
    assert parse_recipe(dump_recipe(paper), "again.yaml") == paper
    changed = load_recipe("demo", ["nha.layer=paper", "nha.sinks=2"])
    assert papers(changed) == PAPER_LAYER | {"sinks": 2}
    given = parse_recipe(SMALL + "nha: {sinks: 3, layer: paper}\n", "my.yaml")
    assert papers(given) == PAPER_LAYER | {"sinks": 3}
    assert papers(load_recipe("demo", ["nha.sinks=2", "nha.layer=paper"])) == PAPER_LAYER | {"sinks": 2}
    read = "nha: {gate_init: horizons, gate_horizons: [8, 100]}\n"
    assert papers(parse_recipe(SMALL + read, "my.yaml", ["nha.layer=paper"])) == PAPER_LAYER
    for override in ("~nha.layer", "nha.layer=own"):
        assert load_recipe("align-only", [override]) == load_recipe("align-only"), "there is nothing to drop"
        assert papers(parse_recipe(dump_recipe(paper), "again.yaml", [override])) == papers(small())
    with pytest.raises(ValueError, match="frozen"):
        paper.nha.layer = "own"
    assert "gate_init key of layer: paper" in complaint(SMALL + "nha: {layer: paper, gate: routed}\n")[0]
    assert "allowed: own, paper" in complaint(SMALL + "nha: {layer: papr}\n")[0]
