"""README.md of an exported checkpoint: how to load it, what was measured, how it was made. Imports no torch."""

from __future__ import annotations

from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ..data_settings import SourceSettings
from ..evaluate.table import table_header, table_notes, table_rows
from ..recipe import Recipe
from .base_model import BaseModel
from .portable_recipe import hub_datasets, portable_recipe, portable_text

_SUMMARY = (
    "A language model whose attention layers were converted to Native Hybrid Attention (NHA) with nha-convert: each "
    "converted layer keeps the last tokens exactly and folds older ones into a fixed number of memory slots, with one "
    "softmax over both. The memory of these layers does not grow with the context."
)
_LIMITS = (
    "What the teacher cannot do, this model cannot either. Old tokens survive only as far as the slots keep them: look "
    "at recall by distance before relying on exact recall. Assisted decoding, static caches and continuous batching "
    "are refused."
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
_SOURCES = {
    "stdlib": "Python's standard library, as installed where the model was made",
    "recall": "generated documents that state keys and values and ask for them later",
}
_METRICS = (
    ("nll", "NLL per token, nats"),
    ("kl", "KL(teacher || student) per token, nats"),
    ("top1", "top-1 agreement with the teacher"),
)


def model_card(
    config: dict[str, Any],
    changed: list[str] | None,
    recipe: Recipe | None,
    evaluation: dict[str, Any] | None,
    base: BaseModel | None = None,
) -> str:
    """The card's text; local paths of the recipe are reduced to their last part.

    Args:
        config: content of the checkpoint's config.json.
        changed: names of base tensors that differ from the teacher's; None where they were not compared.
        recipe: None where a model was exported without one; the card then tells of no data, training or recipe.
        evaluation: content of eval.json; None where nothing was measured, and the card says so.
        base: the model it was made from; None where that is not known, and the card says so.
    """
    sections: list[tuple[str, str]] = [
        ("Layers", _layers(config)),
        ("Measured", _measured(evaluation)),
        ("Base model and licence", _base(base)),
        ("What changed", _changes(changed)),
    ]
    if recipe is None:
        sections.append(("Training", "No recipe came with this model: which data it saw, if any, is not recorded."))
    else:
        sections += [
            ("Data", _data(recipe)),
            ("Training", _training(recipe)),
            ("Recipe", f"```yaml\n{portable_text(recipe).rstrip()}\n```"),
        ]
    sections.append(("Limits", _LIMITS))
    title = _title(config, base)
    parts = [f"---\n{_front_matter(title, recipe, evaluation, base)}\n---\n", f"# {title}\n", f"{_SUMMARY}\n", _LOAD]
    return "\n".join([*parts, *(f"## {name}\n\n{text}\n" for name, text in sections)])


def _front_matter(title: str, recipe: Recipe | None, evaluation: dict[str, Any] | None, base: BaseModel | None) -> str:
    """The metadata that the Hub reads; a key stands there only where its value is known."""
    languages = list(base.languages) if base is not None else []
    if recipe is not None and any(source.source == "stdlib" for source in recipe.data.sources):
        languages.append("code")
    known: dict[str, Any] = dict(base.licence) if base is not None else {}
    if base is not None and base.hub_id is not None:
        known |= {"base_model": base.hub_id, "base_model_relation": "finetune"}
    results = _eval_results(evaluation)
    if results:
        known |= {"model_name": title, "eval_results": results}
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["nha", "native-hybrid-attention", "linear-attention", "custom_code"],
        language=list(dict.fromkeys(languages)) or None,
        datasets=(hub_datasets(recipe) or None) if recipe is not None else None,
        **known,
    )
    return data.to_yaml()


def _eval_results(evaluation: dict[str, Any] | None) -> list[EvalResult]:
    """The final model's measured numbers, in the form of the Hub's model index."""
    row = (evaluation or {}).get("final") or {}
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="held-out",
            dataset_name="held-out text of the recipe",
            metric_type=key,
            metric_name=name,
            metric_value=round(float(row[key]), 6),
        )
        for key, name in _METRICS
        if row.get(key) is not None
    ]


def _title(config: dict[str, Any], base: BaseModel | None) -> str:
    source = config["model_type"].removeprefix("nha_") if base is None else base.name.rsplit("/", 1)[-1]
    return f"{'Embedded teacher' if source == 'embedded' else source}, converted to NHA"


def _layers(config: dict[str, Any]) -> str:
    windows = config["nha_windows"]
    names = {None: "full", "full": "full (with gates)"}
    shown = ", ".join(names.get(window, str(window)) for window in windows)
    converted = sum(window is not None for window in windows)
    given = config["nha_slots"]
    slots = f"Layer by layer {', '.join(map(str, given))}" if isinstance(given, list) else str(given)
    routed = config.get("nha_gate") == "routed"
    gates = "routed gates" if routed else f"independent gates with tau {config['nha_tau']:g}"
    return (
        f"{converted} of {len(windows)} layers are NHA; windows in tokens, layer by layer: {shown}. "
        f"{slots} slots per key/value head, {config['nha_sinks']} sinks, {gates}, "
        f"slot query scale {'on' if config['nha_slot_query_scale'] else 'off'}, "
        f"slot bias {'on' if config['nha_slot_bias'] else 'off'}, "
        f"rotated slots {'on' if config.get('nha_slot_rotary') else 'off'}."
    )


def _measured(evaluation: dict[str, Any] | None) -> str:
    if evaluation is None:
        return "Nothing was measured; `nha-convert eval` does."
    header = table_header(evaluation)
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    lines += [f"| {' | '.join(cells)} |" for _, cells in table_rows(evaluation)]
    return "\n".join([*lines, "", *table_notes(evaluation)])


def _base(base: BaseModel | None) -> str:
    if base is None:
        return "The base model is not recorded, so its licence is not known here; that licence holds for these weights."
    if base.name == "embedded":
        lines = ["Made from the small model that nha-convert ships."]
    elif base.hub_id is None:
        lines = [f"Made from `{base.name}`, a local folder."]
    else:
        lines = [f"Made from [{base.hub_id}](https://huggingface.co/{base.hub_id})."]
    if base.licence:
        lines.append(f"Its licence holds for these weights: {', '.join(map(str, base.licence.values()))}.")
    else:
        lines.append("Its licence is not stated in its files' metadata; whatever it is, it holds for these weights.")
    if base.licence_files:
        lines.append(f"Its licence files are in this folder: {', '.join(base.licence_files)}.")
    return " ".join(lines)


def _changes(changed: list[str] | None) -> str:
    if changed is None:
        return "Base tensors were not compared with the base model's. New tensors are under `self_attn.nha`."
    if not changed:
        return "No base tensor: all are the teacher's, byte for byte. New tensors are under `self_attn.nha`."
    kinds = sorted({name.split(".")[-2] for name in changed})
    return (
        f"{len(changed)} base tensors ({', '.join(kinds)}) were trained; `export.json` lists them. All others are the "
        "teacher's, byte for byte. New tensors are under `self_attn.nha`."
    )


def _data(recipe: Recipe) -> str:
    sources = portable_recipe(recipe)[0].data.sources
    total = sum(source.weight for source in sources)
    lines = ["| source | share |", "|---|---|"]
    lines += [f"| {_source(source)} | {source.weight / total:.1%} |" for source in sources]
    held_out = f"{recipe.data.held_out_tokens:,} tokens were held out and never trained on."
    return "\n".join([*lines, "", held_out])


def _source(source: SourceSettings) -> str:
    if source.source in _SOURCES:
        return _SOURCES[source.source]
    if source.source == "text":
        return f"`{source.path}` (text)"
    columns = f"column {source.column}" if source.prompt is None else f"columns {source.prompt}, {source.response}"
    kind = "conversations" if source.source == "chat" else "dataset"
    config = f", config {source.config}" if source.config else ""
    place = f"`{source.path}`" + "".join(f" `{file}`" for file in source.data_files or ())
    return f"{place} ({kind}{config}, split {source.split}, {columns})"


def _training(recipe: Recipe) -> str:
    if not recipe.stages:
        return "None: the model was swapped and not trained."
    lines = ["| stage | tokens | steps | sequence | batch |", "|---|---|---|---|---|"]
    for stage in recipe.stages:
        tokens = stage.steps * stage.sequence_length * stage.batch_size
        kind = stage.kind if stage.name is None else f"{stage.kind} ({stage.name})"
        lines.append(f"| {kind} | {tokens:,} | {stage.steps} | {stage.sequence_length} | {stage.batch_size} |")
    return "\n".join(lines)
