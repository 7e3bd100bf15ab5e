"""A LoRA adapter trained on top of an exported folder: saved, reloaded, merged, generated with."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.serving.served import PROMPTS, alone, greedy

STEPS = 6
PROGRAM = """
import json
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, adapter, prompt = sys.argv[1:]
base = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert type(base).__module__.startswith("transformers_modules."), type(base)
model = PeftModel.from_pretrained(base, adapter)
inputs = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)(prompt, return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits[0, -1]
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=24, repetition_penalty=1.3)[0]
print(json.dumps({"logits": logits.tolist(), "tokens": tokens[inputs["input_ids"].shape[1]:].tolist()}))
"""


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def texts(folder: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    return tokenizer(list(PROMPTS), return_tensors="pt", padding=True)


@pytest.fixture(scope="module", params=["qv", "qkvo"])
def trained(request: pytest.FixtureRequest, served_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An adapter after a few steps, and the folder it was saved to."""
    torch.manual_seed(0)
    targets = [f"{letter}_proj" for letter in request.param]
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM, r=4, lora_alpha=8, target_modules=targets, modules_to_save=["nha"]
    )
    model = get_peft_model(load(served_folder), config)
    inputs = texts(served_folder)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    losses = []
    for _ in range(STEPS):
        loss = model(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0], losses
    out = tmp_path_factory.mktemp("adapter") / "adapter"
    model.save_pretrained(out)
    return model.eval(), out


def test_the_new_parameters_are_saved_with_the_adapter(trained: Any, served_folder: Path) -> None:
    """All of `nha` is in the adapter's file, and training moved it."""
    saved = load_file(trained[1] / "adapter_model.safetensors")
    base = {name: value for name, value in load(served_folder).state_dict().items() if ".nha." in name}
    for name, value in base.items():
        assert not torch.equal(saved[f"base_model.model.{name}"], value), name
    assert len(base) == sum(".nha." in name for name in saved) == 3 * 4


def test_reloaded_and_merged_equal_the_trained(trained: Any, served_folder: Path) -> None:
    model, out = trained
    inputs = texts(served_folder)
    with torch.no_grad():
        wanted = model(**inputs).logits
        untrained = load(served_folder)(**inputs).logits
        fresh = PeftModel.from_pretrained(load(served_folder), out).eval()
        assert torch.equal(fresh(**inputs).logits, wanted)
        with fresh.disable_adapter():
            assert torch.equal(fresh(**inputs).logits, untrained)
        merged = fresh.merge_and_unload()
        assert not any("lora" in name or "modules_to_save" in name for name, _ in merged.named_modules())
        real = inputs["attention_mask"].bool()
        scale = wanted[real].abs().max()
        assert (wanted - untrained)[real].abs().max() > 1e-2 * scale
        assert (merged(**inputs).logits - wanted)[real].abs().max() <= 1e-5 * scale


def test_merged_model_is_saved_and_loads_again(trained: Any, served_folder: Path, tmp_path: Path) -> None:
    merged = PeftModel.from_pretrained(load(served_folder), trained[1]).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = load(tmp_path / "merged")
    assert {name: value.dtype for name, value in again.state_dict().items()} == {
        name: value.dtype for name, value in merged.state_dict().items()
    }
    with torch.no_grad():
        inputs = texts(served_folder)
        assert torch.equal(again(**inputs).logits, merged(**inputs).logits)


def test_generates_with_the_adapter_where_our_package_is_not(trained: Any, served_folder: Path, tmp_path: Path) -> None:
    model, out = trained
    prompt = list(PROMPTS)[1]
    inputs = AutoTokenizer.from_pretrained(served_folder)(prompt, return_tensors="pt")
    found = alone(PROGRAM, served_folder, out, prompt, cwd=tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(found["logits"]), model(**inputs).logits[0, -1], rtol=1e-5, atol=1e-5)
        assert found["tokens"] == greedy(model, inputs, 24).tolist()
        assert found["tokens"] != greedy(load(served_folder), inputs, 24).tolist()
