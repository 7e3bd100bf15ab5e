"""README.md of an exported checkpoint: how to load it, what was measured, how it was made. Imports no torch."""

from __future__ import annotations

from typing import Any

import yaml

from .evaluate.table import table_header, table_notes, table_rows
from .recipe import Recipe, dump_recipe

_SUMMARY = (
    "A language model whose attention layers were converted to Native Hybrid Attention (NHA) with nha-convert: each "
    "converted layer keeps the last tokens exactly and folds older ones into a fixed number of memory slots, with one "
    "softmax over both. The memory of these layers does not grow with the context."
)
_LIMITS = (
    "What the teacher cannot do, this model cannot either, and its licence holds for these weights. Old tokens survive "
    "only as far as the slots keep them: look at recall by distance before relying on exact recall. Assisted decoding, "
    "static caches and continuous batching are refused."
)
_LOAD = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)
prompt = tokenizer("def main(", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=40)[0]))
```

`PATH` is this folder or its Hub id. torch, transformers and safetensors are all it needs; the model's code is in this
folder, and with nha-convert installed `import nha_convert.modeling` replaces `trust_remote_code=True`.
"""


def model_card(
    config: dict[str, Any], changed: list[str], recipe: Recipe | None, evaluation: dict[str, Any] | None
) -> str:
    """The card's text.

    Args:
        config: content of the checkpoint's config.json.
        changed: names of base tensors that differ from the teacher's.
        recipe: None where a model was exported without one; the card then has no recipe and names no base model.
        evaluation: content of eval.json; None where nothing was measured, and the card says so.
    """
    return "\n".join(
        [
            _front_matter(recipe),
            f"# {_title(config, recipe)}",
            "",
            _SUMMARY,
            "",
            _LOAD,
            "## Layers",
            "",
            _layers(config),
            "",
            "## Measured",
            "",
            _measured(evaluation),
            "",
            "## What changed",
            "",
            _changes(changed),
            "",
            *([] if recipe is None else ["## Recipe", "", "```yaml", dump_recipe(recipe).rstrip(), "```", ""]),
            "## Limits",
            "",
            _LIMITS,
            "",
        ]
    )


def _front_matter(recipe: Recipe | None) -> str:
    fields: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["nha", "native-hybrid-attention", "linear-attention", "custom_code"],
    }
    if recipe is not None and _is_hub_id(recipe.model):
        fields["base_model"] = recipe.model
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---\n"


def _is_hub_id(model: str) -> bool:
    return model.count("/") == 1 and not model.startswith((".", "/", "~"))


def _title(config: dict[str, Any], recipe: Recipe | None) -> str:
    source = (
        config["model_type"].removeprefix("nha_") if recipe is None else recipe.model.rstrip("/").rsplit("/", 1)[-1]
    )
    return f"{'Embedded teacher' if source == 'embedded' else source}, converted to NHA"


def _layers(config: dict[str, Any]) -> str:
    windows = config["nha_windows"]
    shown = ", ".join("full" if window is None else str(window) for window in windows)
    converted = sum(window is not None for window in windows)
    return (
        f"{converted} of {len(windows)} layers are NHA; windows in tokens, layer by layer: {shown}. "
        f"{config['nha_slots']} slots per key/value head, {config['nha_sinks']} sinks, tau {config['nha_tau']:g}, "
        f"slot query scale {'on' if config['nha_slot_query_scale'] else 'off'}, "
        f"slot bias {'on' if config['nha_slot_bias'] else 'off'}."
    )


def _measured(evaluation: dict[str, Any] | None) -> str:
    if evaluation is None:
        return "Nothing was measured; `nha-convert eval` does."
    header = table_header(evaluation)
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    lines += [f"| {' | '.join(cells)} |" for _, cells in table_rows(evaluation)]
    return "\n".join([*lines, "", *table_notes(evaluation)])


def _changes(changed: list[str]) -> str:
    if not changed:
        return "No base tensor: all are the teacher's, byte for byte. New tensors are under `self_attn.nha`."
    kinds = sorted({name.split(".")[-2] for name in changed})
    return (
        f"{len(changed)} base tensors ({', '.join(kinds)}) were trained; `export.json` lists them. All others are the "
        "teacher's, byte for byte. New tensors are under `self_attn.nha`."
    )
