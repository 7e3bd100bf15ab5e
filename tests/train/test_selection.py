"""What a stage trains: which tensors, in which optimizer groups, and what it says it has changed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from objectives_made import make, packed_batch, settings, student

from nha_convert.errors import InputError
from nha_convert.train.selection import select

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def base_part(name: str) -> bool:
    return ".nha." not in name


@pytest.mark.parametrize("part", ["gates", "qkvo", "no_mlp", "all"])
def test_exactly_the_part_learns(pico: Path, part: str) -> None:
    model = student(pico)
    selection = select(model, settings("finetune", train=part), seed=0)
    wanted = {
        "gates": lambda name: not base_part(name),
        "qkvo": lambda name: name.split(".")[-2] in PROJECTIONS,
        "no_mlp": lambda name: base_part(name) and ".mlp." not in name,
        "all": base_part,
    }[part]
    names = {name for name, _ in model.named_parameters() if wanted(name)}
    assert names
    assert {name for name, tensor in model.named_parameters() if tensor.requires_grad} == names
    assert set(selection.names) == names
    grouped = [id(tensor) for group in selection.groups for tensor in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(names)


@pytest.mark.parametrize("train", [["lora"], ["gates", "lora"], ["gates", "qkvo"]])
def test_what_is_said_to_change_is_what_changes(pico: Path, train: list[str]) -> None:
    """After a step and the merge, the named tensors differ from the base model's and all others do not."""
    fresh = student(pico).state_dict()
    options: dict[str, Any] = {"lora": {"targets": ["q_proj", "v_proj"]}} if "lora" in train else {}
    objective = make(pico, "finetune", train=train, **options)
    batch = packed_batch()
    objective(batch, objective.count(batch))[0].backward()
    torch.optim.Adam(objective.groups()).step()
    changed = objective.finish()
    after = objective.model.state_dict()
    differing = {name for name, tensor in after.items() if not torch.equal(tensor, fresh[name])}
    assert differing == set(changed)
    assert all(torch.equal(after[name], tensor) for name, tensor in changed.items())
    stage = objective.settings
    assert all(stage.may_change(name) == (name in changed) for name in after if base_part(name) and "bias" not in name)


def test_groups_have_their_rates_and_only_matrices_decay(pico_models: dict[str, Path]) -> None:
    model = student(pico_models["qwen2"])
    stage = settings("distill", train=["gates", "all"], weight_decay=0.1, learning_rate=3e-4, gate_learning_rate=7e-4)
    groups = {group["name"]: group for group in select(model, stage, seed=0).groups}
    assert {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()} == {
        "lr": (3e-4, 0.1),
        "plain_lr": (3e-4, 0.0),
        "gate_lr": (7e-4, 0.0),
    }
    names = {id(tensor): name for name, tensor in model.named_parameters()}
    plain = {names[id(tensor)] for tensor in groups["plain_lr"]["params"]}
    assert plain == {name for name in names.values() if base_part(name) and ("norm" in name or name.endswith("bias"))}
    assert all(".nha." in names[id(tensor)] for tensor in groups["gate_lr"]["params"])


def test_gates_alone_have_one_group(pico_llama: Path) -> None:
    (group,) = select(student(pico_llama), settings("align", learning_rate=0.5), seed=0).groups
    assert (group["name"], group["lr"], group["weight_decay"]) == ("lr", 0.5, 0.0)


def test_adapters_depend_on_the_seed_alone(pico_llama: Path) -> None:
    def first(seed: int) -> torch.Tensor:
        torch.rand(seed + 1)
        model = student(pico_llama)
        select(model, settings("distill", lora={"rank": 3}), seed)
        return model.get_parameter("model.layers.0.self_attn.q_proj.lora_A.default.weight").detach()

    assert first(1).shape == (3, 64)
    assert torch.equal(first(1), first(1)) and not torch.equal(first(1), first(2))


def test_alignment_reaches_only_the_layers_that_run_nha(pico_llama: Path) -> None:
    for part in ("lora", "qkvo"):
        model = student(pico_llama, full_attention_layers=[0])
        select(model, settings("align", train=["gates", part]), seed=0)
        learned = [name for name, tensor in model.named_parameters() if tensor.requires_grad]
        assert learned and all("layers.1." in name for name in learned)


def test_nothing_to_train_is_refused(pico_llama: Path) -> None:
    with pytest.raises(InputError, match="stages, distill: nothing to train, every layer"):
        select(student(pico_llama, window="full"), settings("distill", train="gates"), seed=0)
    with pytest.raises(InputError, match="stages, first: windows: windows has 3 entries"):
        make(pico_llama, "finetune", name="first", windows=[1, 2, 3])
    losses = [{"function": "attention"}]
    with pytest.raises(InputError, match="attention compares NHA layers"):
        make(pico_llama, "distill", windows="full", train="lora", losses=losses)
