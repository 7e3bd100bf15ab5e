"""The plan's numbers against the models and states themselves."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from nha_kernels.state import NHAState
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from nha_convert.convert import nha_config
from nha_convert.errors import InputError
from nha_convert.gate_attended import FIT_STEPS
from nha_convert.gpus import GPUS, SHARE, Machine, find_machine
from nha_convert.modeling.attention_nha import nha_layers
from nha_convert.plan import dimensions_of, make_plan, model_dimensions
from nha_convert.plan_fit import per_process
from nha_convert.plan_memory import stage_cost
from nha_convert.plan_start import EVALUATIONS
from nha_convert.plan_tables import render_plan
from nha_convert.plan_time import PARTS, stage_time
from nha_convert.preflight import check_inputs, check_output, finished
from nha_convert.recipe import NHASettings, Recipe, dump_recipe, parse_recipe


def recipe_of(model: Path | str, *overrides: str) -> Recipe:
    text = """\
nha: {slots: 16, window: 8, sinks: 2}
data: {sources: [{source: stdlib}, {source: recall}]}
stages:
  - {kind: align, tokens: 1k, sequence_length: 64, batch_size: 2}
  - {kind: distill, tokens: 2k, sequence_length: 64, batch_size: 2, lora: {rank: 4}}
evaluate: {sequence_length: 64}
"""
    return parse_recipe(text, "r.yaml", list(overrides), defaults={"model": str(model)})


def nothing(recipe: Recipe, index: int) -> dict[str, int]:
    """In place of `stage_cost`, which runs a step of each stage."""
    return dict.fromkeys(("trained_parameters", "trained_base_parameters"), 0)


def test_parameters_are_the_models(pico: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(pico)
    assert model_dimensions(str(pico)).parameters == sum(tensor.numel() for tensor in model.parameters())


@pytest.mark.parametrize(("name", "gate"), [("llama_tied_rope", "independent"), ("qwen3_moe", "routed")])
def test_trained_parameters_are_the_students(name: str, gate: str, pico_models: dict[str, Path]) -> None:
    pico = pico_models[name]
    recipe = recipe_of(pico, "nha.full_attention_layers=[0]", "nha.slot_bias=false", f"nha.gate={gate}")
    with torch.device("meta"):
        student = AutoModelForCausalLM.from_config(nha_config(AutoConfig.from_pretrained(pico), recipe.nha))
    new = sum(tensor.numel() for _, layer in nha_layers(student) for tensor in layer.nha.parameters())
    plan = make_plan(recipe, stage_cost)
    assert plan["parameters"]["new"] == new == plan["stages"][0]["trained_parameters"]
    assert [row["new_parameters"] for row in plan["layers"]] == [0, new]
    adapted = get_peft_model(student, LoraConfig(r=4, target_modules=list(recipe.stages[1].lora.targets)))
    adapters = sum(tensor.numel() for name, tensor in adapted.named_parameters() if "lora_" in name)
    assert plan["stages"][1]["trained_parameters"] == new + adapters
    assert plan["stages"][1]["frozen_parameters"] == plan["parameters"]["model"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cache_bytes_are_the_states(pico: Path, dtype: str) -> None:
    sizes, nha = model_dimensions(str(pico)), NHASettings(slots=16, sinks=3)
    state = NHAState.new(
        1,
        sizes.groups,
        nha.slots,
        sizes.head_dim,
        window=8,
        sinks=3,
        rotary_dim=sizes.head_dim,
        dtype=getattr(torch, dtype),
    )
    held = sum(tensor.numel() * tensor.element_size() for tensor in state.tensors().values())
    assert sizes.nha_cache_bytes(nha, 16, 8, {"float32": 4, "bfloat16": 2}[dtype]) == held


def test_plan_of_the_whole(pico_llama: Path) -> None:
    plan = make_plan(recipe_of(pico_llama, "nha.window=[8, full]"), stage_cost, stage_time, find_machine("h200", 2))
    assert json.loads(json.dumps(plan)) == plan
    assert [(row["attention"], row["window"]) for row in plan["layers"]] == [("nha", 8), ("full", None)]
    assert [(row["stage"], row["steps"]) for row in plan["stages"]] == [("align", 8), ("distill", 16)]
    assert plan["cache"][-1]["context"] == 512
    assert plan["cache"][-1]["teacher_bytes"] == 2 * 2 * 16 * 512 * 4 * 2  # k and v, G, D, tokens, fp32, layers
    assert all(row["peak_bytes"] == sum(row["memory_bytes"].values()) > 0 for row in plan["stages"])
    assert any("merged" in note for note in plan["notes"])
    assert (plan["gpu"]["name"], plan["gpu"]["count"]) == ("H200", 2)
    assert plan["hours"] == sum(row["hours"] for row in plan["stages"]) > 0
    assert all(row["hours"] == pytest.approx(sum(row["hours_of"].values())) for row in plan["stages"])
    assert plan["notes"][-1] == "The peak memory of every stage fits one H200 (131 GiB)."
    from rich.console import Console

    console = Console(width=120, record=True)
    console.print(render_plan(plan))
    shown = console.export_text()
    assert "align" in shown and "2 x 64" in shown
    assert "gates start `attended` from 2.05k tokens" in shown.replace("\n", " ")
    assert "on 2 x H200: an estimate, from 50 %" in shown.replace("\n", " ")


def test_plan_of_the_start_of_gates(pico_llama: Path) -> None:
    """A pass of the model, and regressions for every slot: twice the slots, twice the regressions."""
    recipe = recipe_of(pico_llama)
    assert recipe.nha.gate_init == "attended"
    start = make_plan(recipe, nothing)["gates_start"]
    assert (start["method"], start["tokens"]) == ("attended", 32 * 64)
    more = make_plan(recipe_of(pico_llama, "nha.gate_init_rows=64"), nothing)["gates_start"]
    assert more["tokens"] == 64 * 64 and more["bytes"] == 2 * start["bytes"]
    config = AutoConfig.from_pretrained(pico_llama)
    heads = config.num_attention_heads + config.num_key_value_heads
    channels = 2 * (config.hidden_size + heads * (config.hidden_size // config.num_attention_heads))
    assert start["bytes"] == 32 * 64 * channels * 4
    one_pass = make_plan(recipe_of(pico_llama, "nha.gate_init=clusters"), nothing)["gates_start"]["flops"]
    decoder = AutoModelForCausalLM.from_pretrained(pico_llama).model
    weights = sum(tensor.numel() for tensor in decoder.parameters()) - decoder.embed_tokens.weight.numel()
    assert one_pass == 2 * weights * 32 * 64
    assert EVALUATIONS == 5 * FIT_STEPS // 4
    twice = make_plan(recipe_of(pico_llama, "nha.slots=32"), nothing)["gates_start"]["flops"]
    assert twice - one_pass == 2 * (start["flops"] - one_pass) > 0
    for override in ("nha.gate_init=spread", "nha.full_attention_layers=[0, 1]"):
        assert make_plan(recipe_of(pico_llama, override), nothing)["gates_start"] is None


def test_plan_warns_where_the_slots_would_see_nothing(pico_llama: Path) -> None:
    notes = make_plan(recipe_of(pico_llama, "nha.window=64"), nothing)["notes"]
    assert sum("see nothing" in note for note in notes) == 2
    assert sum("fewer than" in note and "new parameters" in note for note in notes) == 2
    assert not any("see nothing" in note for note in make_plan(recipe_of(pico_llama), nothing)["notes"])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stages.0.windows=62", "stages.0: its sequences of 64 tokens fit into every window and the sinks"),
        ("stages.0.windows=[8, 62]", "stages.0: its sequences of 64 tokens fit into windows of 62 and the sinks"),
        ("stages.0.random_windows=[8, 100, 62]", "fit into windows of 62, 100 and the sinks, behind which"),
        ("stages.0.random_windows=[100, 62]", "learn nothing; raise sequence_length or lower random_windows"),
        ("stages.1.windows=full", "stages.1: every layer runs full attention in this stage, so no gate learns"),
        ("stages.1.windows=[8, full]", "stages.1: 1 of 2 NHA layers run full attention in this stage"),
        ("stages.0.windows=61", ""),
    ],
)
def test_a_stages_own_windows_count(pico_llama: Path, override: str, said: str) -> None:
    notes = make_plan(recipe_of(pico_llama, override, "stages.0.tokens=1M", "stages.1.tokens=1M"), nothing)["notes"]
    assert (said in notes[0]) if said else len(notes) == 1
    assert len(notes) == 1 + bool(said)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["stages.0.windows=[8, 8, 8]"],
            "stages.0.windows: the model has 2 layers and needs one entry for each, found 3",
        ),
        (["nha.window=[8, full]", "stages.0.windows=[8, 8]"], "layer 1 keeps full attention"),
    ],
)
def test_windows_that_do_not_fit_the_model(pico_llama: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(InputError) as caught:
        make_plan(recipe_of(pico_llama, *overrides), nothing)
    assert said in str(caught.value)


def test_plan_warns_where_most_layers_stay_full(pico_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pico_llama, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    for layers, warned in ((3, True), (2, False)):
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
        notes = make_plan(recipe_of(folder, "nha.full_attention_layers=[0, 1]" if warned else "seed=0"), nothing)[
            "notes"
        ]
        assert any("2 of 3 layers keep full attention" in note for note in notes) == warned


# ---- hours ---------------------------------------------------------------------------------------
GPU, MACHINE = GPUS["H100"], Machine(GPUS["H100"])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two layers of round sizes: hidden 64, 4 query and 2 key heads of 16, feed-forward 128, vocabulary 256."""
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


QKV, OUT, MLP, GATE, VOCABULARY = 64 * 64 + 2 * 64 * 32, 64 * 64, 3 * 64 * 128, 64 * 2 * 16, 64 * 256
"""Elements of the matrices of `model` and of gates of 16 slots."""
TOKENS = 16 * 2 * 64
"""Of a stage of 2k tokens in rows of 64, two to a step."""
CAUSAL = 64 * (1 - 1 / 2) + 64
"""Keys that a query of 64 tokens computes with, in tiles of 64."""
NEAR = 10 * (1 - 10 / 128) + 64
"""The same in a window of 8 and two sinks."""


def hours_of(model: Path, *overrides: str, index: int = 1, machine: Machine = MACHINE) -> dict[str, float]:
    changed = ["stages.0.tokens=2k", "runtime.dtype=bfloat16", *overrides]
    return stage_time(recipe_of(model, *changed), index, machine)["hours_of"]


def products(elements: float, single: float = 0.0) -> float:
    """Hours of products of every token with so many elements in bf16, and in fp32."""
    return 2 * TOKENS * (elements / GPU.half + single / GPU.single) / SHARE / 3600


def near(slots: float) -> float:
    """Forward FLOPs of one token in one NHA layer: slots of a head and window."""
    return 4 * (slots + 4 * 16 * NEAR)


def slowest(flops: float, moved: float) -> float:
    """Hours of one token's FLOPs or bytes, whichever takes longer, for every token."""
    return TOKENS * max(flops / GPU.half, moved / GPU.bandwidth) / SHARE / 3600


def test_hours_of_alignment_by_hand(model: Path) -> None:
    found = hours_of(model, index=0)
    assert found["teacher_products"] == pytest.approx(products(2 * (QKV + OUT) + MLP))  # ends inside the last layer
    assert found["forward_products"] == pytest.approx(products(2 * OUT, 2 * GATE))  # q, k, v are the teacher's
    assert found["backward_products"] == pytest.approx(products(2 * OUT, 2 * GATE))  # no base weight learns
    assert found["head"] == 0
    query, key, lse = 4 * 16 * 2, 2 * 16 * 2, 4 * 4
    assert found["teacher_attention"] == pytest.approx(2 * slowest(4 * 64 * CAUSAL, 2 * query + 2 * key + lse))
    gate, decay, write, state = 2 * 16 * 2, 2 * 16 * 4, 2 * 16 * 2, 2 * 16 * 16 * 2 * 2 / 64
    moved = (2 * key + gate + decay + write + state) + (2 * query + 3 * key + decay + write + state + lse)
    slots = 4 * 16 * 16 + 4 * 64 * 16 + 4 * 64 * 16 + 4 * 16 * 16 * 2 / 4
    assert found["forward_attention"] == pytest.approx(2 * slowest(near(slots), moved))
    assert found["backward_attention"] > found["forward_attention"]


def test_hours_of_distillation_by_hand(model: Path) -> None:
    """Adapters of rank 4 on q, k, v, o; nothing below layer 0 learns, so its input has no gradient."""
    found = hours_of(model)
    whole, first, second = QKV + OUT + MLP, 4 * 4 * 64, 4 * (64 + 32 + 32 + 64)
    assert found["teacher_products"] == pytest.approx(products(2 * whole))
    assert found["forward_products"] == pytest.approx(products(2 * (whole + first + second), 2 * GATE))
    learnt, passed = 2 * (first + second), 2 * second + 4 * 64 + first  # of both layers; of o_proj in layer 0
    assert found["backward_products"] == pytest.approx(products((OUT + MLP) + whole + learnt + passed, 3 * GATE))
    assert found["head"] == pytest.approx(products(3 * VOCABULARY * 63 / 64))


@pytest.mark.parametrize(
    ("train", "elements", "gates", "head"),
    [
        ("[gates]", OUT + MLP + QKV + OUT + MLP, 3, 3),
        ("[gates, qkvo]", OUT + MLP + QKV + OUT + MLP + 2 * (QKV + OUT), 3, 3),
        ("[gates, no_mlp]", 4 * (QKV + OUT) + 2 * MLP, 4, 4),  # embeddings learn, so layer 0's input has a gradient
        ("[gates, all]", 4 * (QKV + OUT + MLP), 4, 4),
        ("qkvo", OUT + MLP + QKV + OUT + MLP + 2 * (QKV + OUT), 1, 3),
    ],
)
def test_what_is_trained_decides_the_backward_pass(
    model: Path, train: str, elements: int, gates: int, head: int
) -> None:
    changed = ["~stages.1.lora", f"stages.1.train={train}", "stages.1.precision=bfloat16", "runtime.dtype=float32"]
    if "gates" not in train:
        changed.append("stages.1.gate_learning_rate=2e-3")
    found = hours_of(model, *changed)
    assert found["backward_products"] == pytest.approx(products(elements, gates * GATE))
    assert found["head"] == pytest.approx(products(head * VOCABULARY * 63 / 64))


def test_settings_that_cost_time(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = hours_of(model)
    slow = hours_of(model, "runtime.dtype=float32")
    assert slow["teacher_products"] == pytest.approx(plain["teacher_products"] * GPU.half / GPU.single)
    again = hours_of(model, "runtime.gradient_checkpointing=true")
    for part in ("products", "attention"):
        extra = again[f"backward_{part}"] - plain[f"backward_{part}"]
        assert extra == pytest.approx(plain[f"forward_{part}"])
    alone = hours_of(model, "stages.1.losses=[{function: ce}]")
    assert alone["teacher_products"] == alone["teacher_attention"] == 0
    assert alone["head"] == pytest.approx(plain["head"] * 2 / 3)  # the student's logits and their gradient
    assert hours_of(model, "stages.1.losses=[{function: hidden}]")["head"] == 0
    twice = hours_of(model, "stages.0.memory_weight=1", index=0)
    once = hours_of(model, index=0)
    assert twice["forward_attention"] == pytest.approx(2 * once["forward_attention"])
    assert twice["teacher_products"] == once["teacher_products"]
    shared = hours_of(model, "stages.0.train=[gates, lora]", "~stages.0.lora", index=0)
    assert shared["forward_products"] > once["forward_products"] + products(2 * QKV)  # adapted, so not the teacher's
    monkeypatch.setattr("nha_convert.plan_time.CHUNK", 256 * 126 - 1)
    pieces = hours_of(model)
    assert pieces["head"] == pytest.approx(plain["head"] * 5 / 3)  # both logits once more
    assert hours_of(model, "runtime.micro_batch=1")["head"] == pytest.approx(plain["head"])


def test_drawn_windows_count_their_share(model: Path) -> None:
    small, large = (hours_of(model, f"stages.0.windows={window}", index=0) for window in (8, 32))
    drawn = hours_of(model, "stages.0.random_windows=[8, 32]", index=0)
    for part in PARTS:
        assert drawn[part] == pytest.approx((small[part] + large[part]) / 2)
    full = hours_of(model, "stages.1.windows=full")
    assert full["forward_attention"] == full["teacher_attention"]


def test_hours_grow_with_tokens_and_full_layers_with_the_square_of_the_length(model: Path) -> None:
    def hours(length: int, tokens: int, *overrides: str) -> dict[str, float]:
        changed = [f"stages.1.sequence_length={length}", f"stages.1.tokens={tokens}", *overrides]
        return hours_of(model, *changed)

    few, many = (sum(hours(1024, tokens).values()) for tokens in (8192, 16384))
    assert many == pytest.approx(2 * few)
    totals = [sum(hours(length, 16384).values()) for length in (256, 1024, 4096)]
    assert totals == sorted(totals) and totals[0] < totals[2]
    base = {"runtime.dtype=float32"}  # where compute and not the memory decides
    full, nha = (
        [hours(n, 1 << 16, "nha.window=[8, full]" if f else "seed=0", *base) for n in (2048, 4096)] for f in (1, 0)
    )
    assert full[1]["teacher_attention"] / full[0]["teacher_attention"] == pytest.approx(2, rel=0.07)  # per token
    assert full[1]["forward_attention"] / full[0]["forward_attention"] > 1.5
    assert nha[1]["forward_attention"] / nha[0]["forward_attention"] == pytest.approx(1, rel=0.01)


def test_several_gpus_divide_the_hours(model: Path) -> None:
    one, two = hours_of(model), hours_of(model, machine=Machine(GPU, 2))
    assert two == pytest.approx({part: value / 2 for part, value in one.items()})
    with pytest.raises(InputError, match="stages.1.batch_size: 2 rows cannot be dealt out to 3 processes"):
        hours_of(model, machine=Machine(GPU, 3))


def test_a_mixture_of_experts_costs_what_a_token_meets(pico_models: dict[str, Path]) -> None:
    folder = pico_models["qwen3_moe"]
    sizes = model_dimensions(str(folder))
    assert sizes.dense_layers == 0
    found = hours_of(folder)
    attention = sum(rows * columns for rows, columns in sizes.projections.values())
    met = sizes.experts_per_token * 3 * sizes.hidden * sizes.expert_size + sizes.hidden * sizes.experts
    assert found["teacher_products"] == pytest.approx(products(sizes.layers * (attention + met)))


@pytest.mark.parametrize("name", ["h100", "H100", "rtx 4090", "RTX4090", "a100_80gb"])
def test_names_of_gpus(name: str) -> None:
    assert find_machine(name).gpu.name in GPUS


def test_what_is_no_gpu() -> None:
    with pytest.raises(InputError, match="no GPU named 'A100' is known; allowed: A100-40GB, A100-80GB, H100"):
        find_machine("A100")
    with pytest.raises(InputError, match="--gpus: a number of at least 1 is needed, found 0"):
        find_machine(None, 0)


# ---- memory of a GPU -----------------------------------------------------------------------------
def cost_of(held: int, row: int, kept: int = 0) -> Any:
    """A `stage_cost`: so many GB held, and for each row; with gradient checkpointing `kept` for each row."""

    def cost(recipe: Recipe, index: int) -> dict[str, int]:
        rows = min(recipe.stages[index].batch_size, recipe.runtime.micro_batch or 1 << 30)
        each = kept if recipe.runtime.gradient_checkpointing else row
        parts = {"weights": held, "activations": rows * each}
        return nothing(recipe, index) | {name: value * 10**9 for name, value in parts.items()}

    return cost


@pytest.mark.parametrize(
    ("cost", "count", "overrides", "said"),
    [
        ((10, 2), 1, [], "The peak memory of every stage fits one H100 (74.5 GiB)."),
        (
            (16, 10),
            1,
            [],
            "stages.0: its peak of 89.4 GiB does not fit the 74.5 GiB of one H100; set runtime.micro_batch: 6",
        ),
        ((16, 10), 2, [], "fits one H100"),
        ((16, 70, 5), 1, [], "; set runtime.gradient_checkpointing: true"),
        ((16, 70, 20), 1, [], "; set runtime.micro_batch: 3 and runtime.gradient_checkpointing: true"),
        ((200, 70, 20), 1, [], "; set runtime.engine: fsdp2 on 4 GPUs or more, runtime.micro_batch: 1"),
        ((200, 2), 8, ["runtime.engine=fsdp2"], "fits one H100"),
        (
            (800, 2),
            1,
            [],
            "16 GPUs or more, runtime.micro_batch: 1, runtime.gradient_checkpointing: true, stages.0.batch_size: 16",
        ),
        ((16, 90, 81), 1, [], "no setting makes it fit, so take a larger GPU"),
    ],
)
def test_what_makes_a_stage_fit(
    model: Path, cost: tuple[int, ...], count: int, overrides: list[str], said: str
) -> None:
    recipe = recipe_of(model, "~stages.1", "stages.0.batch_size=8", *overrides)
    plan = make_plan(recipe, cost_of(*cost), stage_time, Machine(GPU, count))
    assert said in plan["notes"][-1]
    assert plan["stages"][0]["fits"] == ("every stage fits" in plan["notes"][-1])


def test_shards_share_what_is_held() -> None:
    memory = {"weights": 60, "gradients": 20, "optimizer": 20, "activations": 100, "allocator": 20}
    assert per_process(memory, 1) == 220
    assert per_process(memory, 5) == 1.1 * (20 + 100)


def test_checkpointing_lowers_the_planned_peak(pico_llama: Path) -> None:
    kept, again = (
        stage_cost(recipe_of(pico_llama, f"runtime.gradient_checkpointing={on}"), 1) for on in ("false", "true")
    )
    assert again["activations"] < kept["activations"] and again["weights"] == kept["weights"]


def test_unusable_models(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="models of type gpt2 cannot be converted; supported: llama .*qwen3_moe"):
        dimensions_of("x", {"model_type": "gpt2"})
    with pytest.raises(InputError, match="is an NHA model already"):
        dimensions_of("x", {"model_type": "nha_llama"})
    with pytest.raises(InputError, match="no number for num_hidden_layers"):
        dimensions_of("x", {"model_type": "llama"})
    with pytest.raises(InputError, match="no such model folder"):
        model_dimensions(str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="holds no config.json"):
        model_dimensions(str(tmp_path))


# ---- preflight -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("nha.window=full", "nothing to train"),
        ("nha.window=[8, 8, 8]", "has 2 layers"),
        ("stages.1.sequence_length=513", "stages.1.sequence_length: 513 is beyond the 512 positions"),
        ("evaluate.sequence_length=1024", "evaluate.sequence_length: 1024 is beyond"),
        ("data.sources=[{source: text, path: /no/such/file.txt}]", "data.sources.0.path: no text found"),
        ("data.sources=[{source: dataset, path: no.jsonl}]", "data.sources.0.path: no file 'no.jsonl'"),
    ],
)
def test_preflight_refuses(pico_llama: Path, tmp_path: Path, override: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        check_inputs(recipe_of(pico_llama, override), tmp_path / "out")
    assert said in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_preflight_passes_what_is_right(pico_llama: Path, tmp_path: Path) -> None:
    check_inputs(recipe_of(pico_llama), tmp_path / "new" / "out")
    check_inputs(recipe_of(pico_llama, "nha.window=full", "stages=[]"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_truncated_weights(pico_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pico_llama, tmp_path / "model")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for cut, said in (
        (whole[:-1], "is truncated"),
        (whole[:40], "truncated inside its header"),
        (b"x" * 64, "truncat"),
    ):
        weights.write_bytes(cut)
        with pytest.raises(InputError, match=said):
            check_inputs(recipe_of(folder), tmp_path / "out")
    weights.write_bytes(whole + b"\0")
    with pytest.raises(InputError, match="is too long"):
        check_inputs(recipe_of(folder), tmp_path / "out")
    weights.unlink()
    with pytest.raises(InputError, match=r"holds no \*\.safetensors"):
        check_inputs(recipe_of(folder), tmp_path / "out")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(InputError, match="is missing, but the index names it"):
        check_inputs(recipe_of(folder), tmp_path / "out")


def test_output_folder(pico_llama: Path, tmp_path: Path) -> None:
    recipe = recipe_of(pico_llama)
    out = tmp_path / "out"
    check_output(recipe, out, resume=True)  # nothing there: starts anew
    out.mkdir()
    (out / ".recipe.yaml.partial").touch()  # a write that was killed
    check_output(recipe, out, resume=False)
    (out / "other").touch()
    with pytest.raises(InputError, match="is not empty; choose another folder"):
        check_output(recipe, out, resume=False)
    with pytest.raises(InputError, match="no recipe.yaml"):
        check_output(recipe, out, resume=True)
    (out / "recipe.yaml").write_text(dump_recipe(recipe))
    with pytest.raises(InputError, match="go on with --resume"):
        check_output(recipe, out, resume=False)
    check_output(recipe, out, resume=True)
    check_output(recipe_of(pico_llama, "output=elsewhere", "runtime.threads=3"), out, resume=True)
    papers = recipe_of(pico_llama, "nha.layer=paper")
    older = {name: value for name, value in papers.nha.model_dump(mode="json").items() if name != "layer"}
    kept = papers.model_dump(mode="json") | {"nha": older}
    (out / "recipe.yaml").write_text(yaml.safe_dump(kept))  # of before the setting
    check_output(papers, out, resume=True)
    (out / "recipe.yaml").write_text(dump_recipe(recipe))
    with pytest.raises(InputError) as caught:
        check_output(recipe_of(pico_llama, "nha.slots=32", "~stages.1"), out, resume=True)
    said = str(caught.value)
    assert "nha.slots is 16 in the folder, 32 now" in said
    assert "stages.1.kind is distill in the folder, null now" in said
    with pytest.raises(InputError, match="is a file"):
        check_output(recipe, out / "other", resume=False)


def test_finished(tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    for name in ("eval.json", "verify.json", "report.html"):
        (tmp_path / name).write_text('{"passed": true}')
    assert not finished(tmp_path)
    (tmp_path / "export" / "config.json").touch()
    assert finished(tmp_path)
    (tmp_path / "verify.json").write_text('{"passed": false}')
    assert not finished(tmp_path)


def memory(recipe: Recipe, index: int) -> int:
    return sum(value for name, value in stage_cost(recipe, index).items() if not name.startswith("trained"))


def test_memory_of_layers_at_a_time(pico_llama: Path, tmp_path: Path) -> None:
    """Two layers cost as one: neither embedding nor head, one layer's tensors, the gates of both."""
    deep = AutoConfig.from_pretrained(pico_llama)
    deep.num_hidden_layers, deep.vocab_size = 8, 4096
    deep.save_pretrained(tmp_path)
    whole = recipe_of(tmp_path, "stages=[{kind: align, tokens: 1k, sequence_length: 64, batch_size: 2}]")
    found = {layers: stage_cost(by_layer(whole, layers), 0) for layers in (None, 1, 3, 8)}
    assert len({cost["trained_parameters"] for cost in found.values()}) == 1
    sizes = [
        sum(cost[part] for part in ("weights", "gradients", "optimizer", "activations")) for cost in found.values()
    ]
    assert sizes[1] < sizes[2] < sizes[3] < sizes[0]
    layer = dimensions_of("deep", json.loads((tmp_path / "config.json").read_text()))
    held = found[3]["weights"] - found[1]["weights"]
    dense = layer.attention_parameters + 3 * layer.hidden * layer.intermediate
    assert held == pytest.approx(2 * 4 * dense, rel=0.02)
    assert found[None]["optimizer"] == pytest.approx(found[1]["optimizer"], rel=0.01)


def by_layer(recipe: Recipe, layers: int | None) -> Recipe:
    runtime = recipe.runtime.model_copy(update={"layers_at_once": layers})
    return recipe.model_copy(update={"runtime": runtime})


def test_memory_of_a_mask_between_documents(pico_llama: Path) -> None:
    """Full layers share one T x T mask where documents are packed, and have none where a row is one document."""
    settings = ("nha.full_attention_layers=[1]", "stages.1.sequence_length=512", "stages.1.batch_size=1")
    apart = [
        memory(recipe_of(pico_llama, *settings, f"data.packing={packing}"), 1) for packing in ("windows", "documents")
    ]
    assert apart[1] - apart[0] > 512 * 512


def test_memory_is_that_of_the_device(pico_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's path where training runs on a GPU, PyTorch's on a CPU; nothing of that stays afterwards."""
    from nha_kernels import backends, ops

    seen: list[str] = []
    real = backends.choose_backend
    monkeypatch.setattr(ops, "choose_backend", lambda *given: seen.append(real(*given)) or seen[-1])
    settings = ("nha.slots=16", "runtime.dtype=float32")
    for device, wanted in (("auto", "triton"), ("cuda", "triton"), ("cpu", "torch")):
        seen.clear()
        stage_cost(recipe_of(pico_llama, *settings, f"runtime.device={device}"), 0)
        assert set(seen) == {wanted}
    query = torch.zeros(1, 2, 4, 16)
    assert real("auto", query, torch.zeros(1, 2, 2, 16)) == "torch"
