"""Writes a model as a folder that plain `transformers` loads: weights, configuration, code, tokenizer, card."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import InputError
from ..model_source import carry_files, resolve_model
from ..recipe import Recipe, load_recipe
from ..remote_code import add_code
from ..run_folder import load_final
from ..weights.shard_writer import write_shards
from ..weights.tensor_files import same_bytes
from ..weights.weight_files import StoredTensor, check_weights, stored_tensors
from ..work_folder import check_new_folder, work_folder
from .base_model import BaseModel, carry_licence, read_base_model
from .export_weights import check_changes, compare_with_teacher, write_weights
from .manifest import CARD, read_manifest, write_manifest
from .model_card import model_card
from .portable_recipe import portable_text


def export_model(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    *,
    teacher_dir: Path,
    recipe: Recipe | None = None,
    evaluation: dict[str, Any] | None = None,
    max_shard_size: str = "5GB",
    quiet: bool = False,
) -> Path:
    """Write `model` to `out`; the folder appears under its name only when complete.

    Args:
        model: an NHA language model without adapters.
        tokenizer: names its class, or is saved, where the teacher's files do not say.
        teacher_dir: the model it was made from. Base tensors that are still equal to the teacher's are written with
            the teacher's bytes and dtype; only those that a distill stage of `recipe` trains may differ.
        recipe: embedded in the folder and its card, local paths reduced to their last part.
        evaluation: content of eval.json, for the card's table.
        max_shard_size: such as `5GB`.
        quiet: no progress bar.
    Returns:
        `out`.
    Raises:
        InputError: `out` holds something.
        WorkError: a tensor holds NaN, a base tensor differs that no stage trains, or the model lacks one; nothing is
            left behind.
    """
    out, teacher_dir = Path(out).expanduser(), Path(teacher_dir)
    check_new_folder(out)
    base = read_base_model(str(teacher_dir) if recipe is None else recipe.model, teacher_dir)
    with work_folder(out) as work:
        stored = stored_tensors(teacher_dir)
        own, changed = compare_with_teacher(model, stored)
        check_changes(changed, recipe)
        write_weights(work, own, stored, max_shard_size, quiet=quiet)
        config = copy.deepcopy(model.config)
        config.dtype = model.dtype
        config.architectures = [type(model).__name__]
        config.save_pretrained(work)
        carry_files(teacher_dir, work)
        carry_licence(teacher_dir, work)
        if not (work / "generation_config.json").is_file():
            model.generation_config.save_pretrained(work)
        _name_tokenizer(work, tokenizer)
        _describe(work, changed, sorted(set(own) - set(changed)), base, recipe, evaluation)
    return out


def export_run(run_dir: Path, out: Path, *, max_shard_size: str | None = None, quiet: bool = False) -> Path:
    """Rebuild a run's final model from its stages and export it.

    Args:
        max_shard_size: None takes the recipe's.
    Raises:
        InputError: not a finished run folder, or `out` holds something.
    """
    run_dir, out = Path(run_dir), Path(out).expanduser()
    check_new_folder(out)
    model, tokenizer, recipe = load_final(run_dir)
    evaluation = run_dir / "eval.json"
    return export_model(
        model,
        tokenizer,
        out,
        teacher_dir=resolve_model(recipe.model),
        recipe=recipe,
        evaluation=json.loads(evaluation.read_text(encoding="utf-8")) if evaluation.is_file() else None,
        max_shard_size=max_shard_size or recipe.export.max_shard_size,
        quiet=quiet,
    )


def export_checkpoint(
    folder: Path | str,
    out: Path,
    *,
    teacher: str | None = None,
    max_shard_size: str | None = None,
    quiet: bool = False,
) -> Path:
    """Write any NHA checkpoint anew, such as what `swap` wrote: own shards, this version's code, card and manifest.

    The weights are copied from file to file as bytes. What an earlier export says of itself (card, recipe, which
    tensors were changed) is kept.

    Args:
        folder: holds the config.json of an NHA model, and safetensors.
        teacher: the model it was made from (Hub id, folder or `embedded`), for the card, the licence, and the record
            of which base tensors differ; None leaves to an earlier export's record what it says.
        max_shard_size: such as `5GB`, which is the default.
    Returns:
        `out`.
    Raises:
        InputError: `folder` is no NHA checkpoint, `out` holds something, or `teacher` is another model.
    """
    folder, out = Path(folder).expanduser(), Path(out).expanduser()
    check_new_folder(out)
    check_nha_config(folder)
    check_weights(folder)
    stored = stored_tensors(folder)
    before = read_manifest(folder) or {}
    changed: list[str] | None = before.get("changed")
    base = None
    teacher_dir = None
    if teacher is not None:
        teacher_dir = resolve_model(teacher)
        base = read_base_model(teacher, teacher_dir)
        changed = _differences(folder, stored, teacher, stored_tensors(teacher_dir))
    with work_folder(out) as work:
        write_shards(work, stored, max_shard_size or "5GB", quiet=quiet)
        shutil.copyfile(folder / "config.json", work / "config.json")
        carry_files(folder, work)
        for source in (folder, *([teacher_dir] if teacher_dir is not None else [])):
            carry_licence(source, work)
        recipe = load_recipe(str(folder / "recipe.yaml")) if (folder / "recipe.yaml").is_file() else None
        new = [name for name in sorted(stored) if ".self_attn.nha." in name]
        _describe(work, changed, new, base, recipe, None, before, folder)
    return out


def check_nha_config(folder: Path) -> None:
    """Whether a folder holds the configuration of an NHA model.

    Raises:
        InputError: it does not.
    """
    path = folder / "config.json"
    try:
        kind = json.loads(path.read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: is no model's configuration ({error}); name a run folder or a checkpoint") from error
    if not str(kind).startswith("nha_"):
        raise InputError(
            f"{folder}: is a {kind} model, not an NHA checkpoint; convert it: nha-convert swap {folder} OUT"
        )


def _describe(
    work: Path,
    changed: list[str] | None,
    new: list[str],
    base: BaseModel | None,
    recipe: Recipe | None,
    evaluation: dict[str, Any] | None,
    before: dict[str, Any] | None = None,
    source: Path | None = None,
) -> None:
    """Code, recipe, card, and last the manifest; an earlier export's card stays where no base model is named anew."""
    add_code(work)
    if recipe is not None:
        (work / "recipe.yaml").write_text(portable_text(recipe), encoding="utf-8")
    if before and base is None and source is not None and (source / CARD).is_file():
        shutil.copyfile(source / CARD, work / CARD)
    else:
        config = json.loads((work / "config.json").read_text(encoding="utf-8"))
        (work / CARD).write_text(model_card(config, changed, recipe, evaluation, base), encoding="utf-8")
    name = base.name if base is not None else (before or {}).get("base_model")
    write_manifest(work, changed=changed, new=new, base_model=name)


def _differences(
    folder: Path, ours: dict[str, StoredTensor], teacher: str, theirs: dict[str, StoredTensor]
) -> list[str]:
    """Names of base tensors whose bytes differ.

    Raises:
        InputError: tensors of the teacher are missing, or have other shapes.
    """
    wrong = [name for name, tensor in theirs.items() if name not in ours or ours[name].shape != tensor.shape]
    if wrong:
        raise InputError(
            f"--teacher {teacher}: {folder} has no tensors like {len(wrong)} of it ({', '.join(sorted(wrong)[:3])}); "
            "name the model that it was made from"
        )
    return sorted(name for name in theirs if not same_bytes(ours[name], theirs[name]))


def _name_tokenizer(work: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the tokenizer's class known without a model type that `transformers` knows; nothing else changes."""
    path = work / "tokenizer_config.json"
    if not path.is_file():
        tokenizer.save_pretrained(work)
        return
    settings = json.loads(path.read_text(encoding="utf-8"))
    if "tokenizer_class" not in settings:
        settings["tokenizer_class"] = type(tokenizer).__name__
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
