"""Writes a model as a folder that plain `transformers` loads: weights, configuration, code, tokenizer, card."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedTokenizerBase

from .convert import INDEX, carry_files, new_parameter_names, resolve_model
from .errors import WorkError
from .model_card import model_card
from .preflight import check_new_folder
from .recipe import DistillStage, Recipe, dump_recipe
from .remote_code import add_code
from .run_folder import load_final
from .tensor_files import StoredTensor, file_hashes, same_bytes, stored_tensors
from .verify import MANIFEST

CARD = "README.md"


def export_model(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    *,
    teacher_dir: Path,
    recipe: Recipe | None = None,
    evaluation: dict[str, Any] | None = None,
    max_shard_size: str = "5GB",
) -> Path:
    """Write `model` to `out`; the folder appears under its name only when complete.

    Args:
        model: an NHA language model without adapters.
        tokenizer: saved where the teacher's folder has no tokenizer files of its own.
        teacher_dir: the model it was made from. Base tensors that are still equal to the teacher's are written with
            the teacher's bytes and dtype; only those that a distill stage of `recipe` trains may differ.
        recipe: embedded in the folder and its card.
        evaluation: content of eval.json, for the card's table.
        max_shard_size: such as `5GB`.
    Returns:
        `out`.
    Raises:
        InputError: `out` holds something.
        WorkError: a base tensor differs that no stage trains, or the model lacks one; nothing is left behind.
    """
    out = Path(out).expanduser()
    check_new_folder(out)
    teacher_dir = Path(teacher_dir)
    stored = stored_tensors(teacher_dir)
    state = _state(model, stored)
    changed = _changed_tensors(state, stored)
    _check_changes(changed, recipe)
    out.parent.mkdir(parents=True, exist_ok=True)
    work = out.with_name(f".{out.name}.partial")
    shutil.rmtree(work, ignore_errors=True)  # left by an export that was killed
    work.mkdir()
    try:
        _write_weights(work, state, stored, changed, max_shard_size)
        _check_untouched(work, stored, changed)
        _write_description(work, model, tokenizer, teacher_dir)
        if recipe is not None:
            (work / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
        card = model_card(json.loads((work / "config.json").read_text(encoding="utf-8")), changed, recipe, evaluation)
        (work / CARD).write_text(card, encoding="utf-8")
        _write_manifest(work, changed, sorted(set(state) - set(stored)))
        os.replace(work, out)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return out


def export_run(run_dir: Path, out: Path) -> Path:
    """Rebuild a run's final model from its stages and export it.

    Raises:
        InputError: not a finished run folder, or `out` holds something.
    """
    run_dir = Path(run_dir)
    model, tokenizer, recipe = load_final(run_dir)
    evaluation = run_dir / "eval.json"
    return export_model(
        model,
        tokenizer,
        out,
        teacher_dir=resolve_model(recipe.model),
        recipe=recipe,
        evaluation=json.loads(evaluation.read_text(encoding="utf-8")) if evaluation.is_file() else None,
        max_shard_size=recipe.export.max_shard_size,
    )


def _state(model: nn.Module, stored: dict[str, StoredTensor]) -> dict[str, torch.Tensor]:
    """The model's tensors by name; tied ones only under names that the teacher's files have.

    Raises:
        WorkError: the model has a base tensor that the teacher's files lack.
    """
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    state = {name: tensor for name, tensor in model.state_dict().items() if name in stored or name not in tied}
    unknown = sorted(set(state) - set(stored) - new_parameter_names(model))
    if unknown:
        raise WorkError(
            f"{len(unknown)} tensors of the model are neither the teacher's nor NHA's ({', '.join(unknown[:3])}); "
            "merge adapters first, and name the folder that the model was made from"
        )
    return state


def _changed_tensors(state: dict[str, torch.Tensor], stored: dict[str, StoredTensor]) -> list[str]:
    """Names of base tensors that are no longer the teacher's, seen in the model's dtype."""
    changed = []
    for path, names in _by_file((name for name in stored if name in state), stored).items():
        with safe_open(path, "pt") as file:
            for name in names:
                now = state[name].detach().cpu()
                before = file.get_tensor(name).to(now.dtype)
                if before.shape != now.shape or not torch.equal(_bits(before), _bits(now)):
                    changed.append(name)
    return sorted(changed)


def _check_changes(changed: Iterable[str], recipe: Recipe | None) -> None:
    """Only what a stage trains may differ from the teacher.

    Raises:
        WorkError: something else does.
    """
    stages = recipe.stages if recipe is not None else []
    trained = tuple(
        f".{target}.weight" for stage in stages if isinstance(stage, DistillStage) for target in stage.lora.targets
    )
    wrong = [name for name in changed if not name.endswith(trained)]
    if wrong:
        raise WorkError(
            f"{len(wrong)} base tensors differ from the teacher's, untrained by any stage ({', '.join(wrong[:3])}); "
            "was the teacher's folder changed during the run?"
        )


def _write_weights(
    work: Path,
    state: dict[str, torch.Tensor],
    stored: dict[str, StoredTensor],
    changed: list[str],
    max_shard_size: str,
) -> None:
    """Shard by shard: the teacher's own tensors where they are untouched, the model's otherwise."""
    own = {name: state[name] for name in [*changed, *sorted(set(state) - set(stored))]}
    where = _by_file((name for name in stored if name not in own), stored)
    sizes: dict[str, torch.Tensor] = {name: torch.empty_like(tensor, device="meta") for name, tensor in own.items()}
    for path, names in where.items():
        with safe_open(path, "pt") as file:
            sizes |= {name: torch.empty_like(file.get_tensor(name), device="meta") for name in names}
    plan = split_torch_state_dict_into_shards(
        dict(sorted(sizes.items())), filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    for shard, names in plan.filename_to_tensors.items():
        tensors = {name: own[name].detach().cpu().contiguous() for name in names if name in own}
        for path, there in where.items():
            with safe_open(path, "pt") as file:
                tensors |= {name: file.get_tensor(name) for name in sorted(set(there) & set(names))}
        save_file(tensors, work / shard, {"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (work / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check_untouched(work: Path, stored: dict[str, StoredTensor], changed: list[str]) -> None:
    """Compare what was written with the teacher's files, byte for byte.

    Raises:
        WorkError: a tensor that no stage trained was written differently.
    """
    written = stored_tensors(work)
    wrong = [
        name
        for name in stored
        if name not in changed and not (name in written and same_bytes(written[name], stored[name]))
    ]
    if wrong:
        raise WorkError(
            f"{len(wrong)} untouched tensors were not written as the teacher has them ({', '.join(wrong[:3])})"
        )


def _write_description(work: Path, model: Any, tokenizer: PreTrainedTokenizerBase, teacher_dir: Path) -> None:
    """config.json with the code it points to, generation config, tokenizer."""
    config = copy.deepcopy(model.config)
    config.dtype = model.dtype
    config.architectures = [type(model).__name__]
    config.save_pretrained(work)
    add_code(work)
    carry_files(teacher_dir, work)
    if not (work / "generation_config.json").is_file():
        model.generation_config.save_pretrained(work)
    if not _names_tokenizer(work):
        tokenizer.save_pretrained(work)


def _names_tokenizer(folder: Path) -> bool:
    """Whether the tokenizer's class can be told without a model type that `transformers` knows."""
    path = folder / "tokenizer_config.json"
    return path.is_file() and "tokenizer_class" in json.loads(path.read_text(encoding="utf-8"))


def _write_manifest(work: Path, changed: list[str], new: list[str]) -> None:
    """export.json: what changed, what is new, the hash of every file but the card, and who wrote it."""
    names = [path.name for path in work.iterdir() if path.is_file() and path.name != CARD]
    manifest = {
        "changed": changed,
        "new": new,
        "files": file_hashes(work, names),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    (work / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _by_file(names: Iterable[str], stored: dict[str, StoredTensor]) -> dict[Path, list[str]]:
    files: dict[Path, list[str]] = {}
    for name in names:
        files.setdefault(stored[name].path, []).append(name)
    return files


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)
