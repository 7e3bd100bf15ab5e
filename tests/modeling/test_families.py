"""The family matrix: every supported family, rope scaling, tied and untied, sliding, experts, in fp32."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from nha_convert.convert import load_student, new_parameter_names
from nha_convert.errors import InputError
from nha_convert.families import FAMILIES
from nha_convert.modeling.attention_nha import nha_layers
from nha_convert.publish.checkpoint_probe import REFUSED
from nha_convert.recipe_choice import BY_SIZE
from nha_convert.settings import NHASettings
from nha_convert.swap import swap_checkpoint
from tests.conftest import FURTHER_MODELS, PICO_MODELS, make_pico

IDS = torch.arange(2 * 40).view(2, 40) * 7 % 251
LEFT = torch.ones(2, 40, dtype=torch.long)
LEFT[1, :11] = 0
SMALL = NHASettings(window=6, slots=8, sinks=2)
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def members(pico_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folder of every member of every family, by name."""
    root = tmp_path_factory.mktemp("members")
    return pico_models | {name: make_pico(name, root / name) for name in FURTHER_MODELS}


@pytest.fixture(params=sorted(PICO_MODELS | FURTHER_MODELS))
def member(request: pytest.FixtureRequest, members: dict[str, Path]) -> Path:
    return members[request.param]


@torch.no_grad()
def in_two_pieces(model: Any) -> torch.Tensor:
    """Logits of IDS, the second half read on the cache of the first."""
    first = model(IDS[:, :17], use_cache=True)
    second = model(IDS[:, 17:], past_key_values=first.past_key_values, use_cache=True)
    return torch.cat((first.logits, second.logits), 1)


def test_the_matrix_has_every_family() -> None:
    made = {make().model_type for make in (PICO_MODELS | FURTHER_MODELS).values()}
    assert made == set(FAMILIES) == {one.family for one in BY_SIZE}


@torch.no_grad()
@pytest.mark.parametrize("how", ["converted full", "set full"])
def test_all_windows_full_is_the_teacher(member: Path, how: str) -> None:
    teacher = AutoModelForCausalLM.from_pretrained(member)
    student = load_student(member, NHASettings(window="full") if how == "converted full" else SMALL)
    if how == "set full":
        assert not torch.allclose(student(IDS).logits, teacher(IDS).logits, atol=1e-2)
        student.set_windows("full")
    assert len(nha_layers(student)) == (0 if how == "converted full" else 2)
    for mask in (None, LEFT):
        assert torch.equal(student(IDS, attention_mask=mask).logits, teacher(IDS, attention_mask=mask).logits)
    assert torch.equal(
        student.generate(IDS, attention_mask=LEFT, **GREEDY), teacher.generate(IDS, attention_mask=LEFT, **GREEDY)
    )
    beyond = torch.arange(600)[None] * 13 % 251  # past the sliding windows of 128 and the 512 trained positions
    assert torch.equal(student(beyond).logits, teacher(beyond).logits)


@torch.no_grad()
def test_window_wider_than_the_text_is_the_teacher(member: Path) -> None:
    teacher = AutoModelForCausalLM.from_pretrained(member)
    student = load_student(member, NHASettings(window=128, slots=8))
    assert len(nha_layers(student)) == 2
    wanted = teacher(IDS).logits
    for found in (student(IDS).logits, in_two_pieces(student)):  # at once, plain causal attention runs
        difference = (found - wanted).abs().max()
        assert difference <= 1e-5, difference  # acceptance row: the op itself in fp32


def test_every_new_parameter_has_a_gradient(member: Path) -> None:
    model = load_student(member, SMALL).train()
    model(IDS, labels=IDS).loss.backward()
    new, parameters = new_parameter_names(model), dict(model.named_parameters())
    assert len(new) == 2 * 4
    assert all(parameters[name].grad.isfinite().all() and parameters[name].grad.abs().max() > 0 for name in new)


@torch.no_grad()
def test_save_and_load(member: Path, tmp_path: Path) -> None:
    model = load_student(member, NHASettings(window=[6, "full"], slots=8, sinks=2))
    model.save_pretrained(tmp_path)
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    base, saved = load_file(member / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert set(saved) - set(base) == new_parameter_names(model)
    assert all(torch.equal(saved[name], tensor) for name, tensor in base.items())


STRANGER = f"""
import importlib.abc, json, sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] in {REFUSED!r}:
            raise ModuleNotFoundError(fullname)

sys.meta_path.insert(0, Refuse())
ids = torch.arange(2 * 40).view(2, 40) * 7 % 251
logits = {{}}
for name, folder in json.loads(sys.argv[1]).items():
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto")
    assert type(model).__module__.startswith("transformers_modules"), type(model)
    with torch.no_grad():
        logits[name] = model(ids).logits.contiguous()
save_file(logits, sys.argv[2])
"""


def test_swapped_folders_load_with_their_own_code(members: dict[str, Path], tmp_path: Path) -> None:
    """One process that cannot see our packages loads every member and computes what we compute."""
    folders = {name: tmp_path / name for name in members}
    for name, folder in members.items():
        swap_checkpoint(folder, folders[name], SMALL, seed=3, quiet=True)
    told = json.dumps({name: str(folder) for name, folder in folders.items()})
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    subprocess.run(
        [sys.executable, "-I", "-c", STRANGER, told, str(tmp_path / "logits.safetensors")],
        env=environment | {"HF_MODULES_CACHE": str(tmp_path / "modules")},
        cwd=tmp_path,
        check=True,
    )
    found = load_file(tmp_path / "logits.safetensors")
    assert sorted(found) == sorted(members)
    with torch.no_grad():
        for name, folder in members.items():
            assert torch.equal(found[name], load_student(folder, SMALL, seed=3)(IDS).logits), name


def test_sliding_windows_are_what_transformers_makes_of_them(member: Path) -> None:
    config = AutoConfig.from_pretrained(member)
    ours = FAMILIES[config.model_type].sliding_windows(config.to_dict())
    theirs = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]
    assert ours == theirs
    saved = json.loads((member / "config.json").read_text())
    assert FAMILIES[config.model_type].sliding_windows(saved) == theirs


@pytest.mark.parametrize("name", ["qwen2_sliding", "mistral_tied_sliding"])
def test_windows_beyond_a_sliding_layer_are_refused(name: str, members: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="129 is more than the 128 tokens that layers .*1 of .*full_attention_layers"):
        load_student(members[name], NHASettings(window=129, slots=8))
    load_student(members[name], NHASettings(window=["full", 128], slots=8))


def test_experts_and_their_router(members: dict[str, Path], tmp_path: Path) -> None:
    """A mixture of experts keeps its auxiliary loss, and stores experts as its teacher does."""
    model = load_student(members["qwen3_moe"], SMALL)
    teacher = AutoModelForCausalLM.from_pretrained(members["qwen3_moe"])
    assert (model.num_experts, model.num_experts_per_tok) == (teacher.num_experts, teacher.num_experts_per_tok)
    output = model(IDS, labels=IDS, output_router_logits=True)
    assert len(output.router_logits) == 2 and output.aux_loss > 0
    assert output.loss > model(IDS, labels=IDS).loss
    stored = load_file(members["qwen3_moe"] / "model.safetensors")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_bytes((members["qwen3_moe"] / "config.json").read_bytes())
    lost = "model.layers.1.mlp.experts.3.up_proj.weight"
    save_file({name: x for name, x in stored.items() if name != lost}, damaged / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="experts"):
        load_student(damaged, SMALL)
