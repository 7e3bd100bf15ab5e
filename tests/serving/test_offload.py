"""`device_map` with layers on disk: accelerate's hooks bring the weights of each module in as it is called."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.serving.served import PROMPTS

ON_DISK = {  # one NHA layer and the full-attention layer are on disk
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.norm": "cpu",
    "lm_head": "disk",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.layers.2": "disk",
    "model.layers.3": "cpu",
}
SPLIT_LAYER = {  # inside one NHA layer: only the new parameters are on disk
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.norm": "cpu",
    "lm_head": "cpu",
    **{f"model.layers.{layer}": "cpu" for layer in (0, 1, 3)},
    **{f"model.layers.2.{part}": "cpu" for part in ("input_layernorm", "post_attention_layernorm", "mlp")},
    **{f"model.layers.2.self_attn.{part}_proj": "cpu" for part in "qkvo"},
    "model.layers.2.self_attn.nha": "disk",
}


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)


def through_hooks(folder: Path, kind: str, offload: Path) -> Any:
    """The model, offloaded one of five ways."""
    if kind == "disk_offload":
        model = load(folder)
        disk_offload(model, offload, execution_device=torch.device("cpu"))
    elif kind == "cpu_offload":
        model = load(folder)
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        options: dict[str, Any] = {
            "auto": {"device_map": "auto", "max_memory": {"cpu": 6_000_000}},
            "layers": {"device_map": ON_DISK},
            "gate": {"device_map": SPLIT_LAYER},
        }[kind]
        model = load(folder, offload_folder=offload, **options)
        assert "disk" in model.hf_device_map.values() and "cpu" in model.hf_device_map.values()
    assert any(parameter.is_meta for name, parameter in model.named_parameters() if ".nha." in name)
    return model


@pytest.mark.parametrize("kind", ["auto", "layers", "gate", "cpu_offload", "disk_offload"])
def test_offloaded_equals_whole(kind: str, served_folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(served_folder, padding_side="left")
    inputs = tokenizer(list(PROMPTS), return_tensors="pt", padding=True)
    whole, offloaded = load(served_folder), through_hooks(served_folder, kind, tmp_path / "offload")
    with torch.no_grad():
        assert torch.equal(offloaded(**inputs).logits, whole(**inputs).logits)
    options = {"do_sample": False, "max_new_tokens": 30, "repetition_penalty": 1.3}
    assert torch.equal(offloaded.generate(**inputs, **options), whole.generate(**inputs, **options))
