"""The weights of an export: what of a model is still its teacher's, and the writing of both kinds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.core_model_loading import revert_weight_conversion

from ..convert import new_parameter_names
from ..errors import WorkError
from ..recipe import Recipe
from ..weights.shard_writer import NewTensor, write_shards
from ..weights.tensor_files import same_bytes
from ..weights.weight_files import StoredTensor, stored_tensors

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def compare_with_teacher(model: Any, stored: dict[str, StoredTensor]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Sort a model's tensors into its own and its teacher's, one at a time, seen in the model's dtype.

    Args:
        model: an NHA language model without adapters; base tensors on the meta device are its teacher's.
        stored: the teacher's tensors.
    Returns:
        the tensors that must be written from memory (changed and new ones) by name, and the names of changed ones.
    Raises:
        WorkError: the model has a base tensor that the teacher's files lack.
    """
    new = new_parameter_names(model)
    own: dict[str, torch.Tensor] = {}
    changed, unknown = [], []
    with ExitStack() as files:
        opened: dict[Path, Any] = {}
        for name, now in _stored_form(model, stored, new):
            if name in new:
                own[name] = now
            elif name not in stored:
                unknown.append(name)
            elif not now.is_meta:  # which was never read, so never changed
                path = stored[name].path
                if path not in opened:
                    opened[path] = files.enter_context(safe_open(path, "pt"))
                if not _same(opened[path].get_tensor(name), now):
                    changed.append(name)
                    own[name] = now
    if unknown:
        raise WorkError(
            f"{len(unknown)} tensors of the model are neither the teacher's nor NHA's ({', '.join(unknown[:3])}); "
            "merge adapters first, and name the folder that the model was made from"
        )
    return own, sorted(changed)


def _stored_form(model: Any, stored: dict[str, StoredTensor], new: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """A model's tensors under the names of its teacher's files.

    A tensor that `transformers` fuses on loading (the experts of a mixture) is taken apart as `save_pretrained`
    does, alone. Tied tensors come only under names that the files have.
    """
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    for name, tensor in model.state_dict().items():
        if name in stored or name in new:
            yield name, tensor.detach()
        elif name not in tied:
            yield from revert_weight_conversion(model, {name: tensor.detach()}).items()


def _same(before: torch.Tensor, now: torch.Tensor) -> bool:
    now = now.cpu()
    return before.shape == now.shape and torch.equal(_bits(before.to(now.dtype)), _bits(now))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def check_changes(changed: Iterable[str], recipe: Recipe | None) -> None:
    """Only what a stage trains may differ from the teacher.

    Raises:
        WorkError: something else does.
    """
    stages = recipe.stages if recipe is not None else []
    wrong = [name for name in changed if not any(stage.may_change(name) for stage in stages)]
    if wrong:
        raise WorkError(
            f"{len(wrong)} base tensors differ from the teacher's, untrained by any stage ({', '.join(wrong[:3])}); "
            "was the teacher's folder changed during the run?"
        )


def write_weights(
    work: Path,
    own: dict[str, torch.Tensor],
    stored: dict[str, StoredTensor],
    max_shard_size: str,
    *,
    quiet: bool = False,
) -> None:
    """Write the model's own tensors from memory and all others with the teacher's bytes, then compare these.

    Raises:
        WorkError: a tensor holds NaN or infinity, or one of the teacher's was written differently.
    """
    kept = {name: tensor for name, tensor in stored.items() if name not in own}
    new = {name: _new_tensor(tensor) for name, tensor in own.items()}
    write_shards(work, {**kept, **new}, max_shard_size, quiet=quiet)
    written = stored_tensors(work)
    wrong = [name for name in kept if not (name in written and same_bytes(written[name], kept[name]))]
    if wrong:
        raise WorkError(
            f"{len(wrong)} untouched tensors were not written as the teacher has them ({', '.join(wrong[:3])})"
        )


def _new_tensor(tensor: torch.Tensor) -> NewTensor:
    return NewTensor(
        DTYPES[tensor.dtype],
        tuple(tensor.shape),
        lambda: memoryview(_bits(tensor.cpu()).numpy()),  # type: ignore[arg-type]
    )
