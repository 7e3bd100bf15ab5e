"""What the swap does to a checkpoint on disk, without loading it."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import AutoModelForCausalLM

from .convert import load_base_config, nha_config
from .errors import InputError, WorkError
from .files import shown
from .gate_init import refuse_text
from .model_source import carried_files, carry_files, resolve_model
from .remote_code import add_code
from .settings import NHASettings
from .weights.base_shards import Advance, check_shard_size, convert_pickles, cut_anew, link_or_copy
from .weights.gate_shards import write_gates
from .weights.pickled_weights import PickledTensor, pickled_tensors
from .weights.shard_files import tensor_bytes
from .weights.tensor_check import check_tensors, expected_shapes
from .weights.weight_files import (
    INDEX,
    StoredTensor,
    check_weights,
    checked_config,
    compare_sizes,
    only_pickles,
    read_header,
)
from .work_folder import check_new_folder, terminable, work_folder


def swap_checkpoint(
    model: Path | str,
    out: Path,
    nha: NHASettings,
    *,
    seed: int = 0,
    quiet: bool = False,
    copy: bool = False,
    max_shard_size: str | None = None,
    allow_pickle: bool = False,
) -> dict[str, Any]:
    """Write `model` with its attention swapped to `out`, a block of a tensor in memory at a time.

    Base tensors keep their bytes: their shards are hard-linked (copied where that is impossible), copied, or cut anew;
    pickled ones are written as safetensors. The new tensors stand in `model-nha*.safetensors`. All values are looked
    at on the way. The folder appears under its name only when complete.

    Args:
        model: folder, Hub id or `embedded`.
        out: folder to make; may exist if empty.
        copy: copy shards even where they could be linked.
        max_shard_size: such as `2GB`: cut the shards anew.
        allow_pickle: read `pytorch_model*.bin` where there are no safetensors.
    Returns:
        {"out", "layers", "nha_layers", "base_tensors", "new_tensors", "new_parameters", "bytes", "left_out"}.
    Raises:
        InputError: `out` holds something, or the model is missing, damaged, of an unsupported family or holds NaN or
            infinity, or the gates start from text; nothing is left behind.
        WorkError: writing failed or was interrupted; nothing is left behind.
    """
    out = Path(out).expanduser()
    refuse_text(nha, "swap moves weights from file to file and runs no model (`nha-convert run` does)")
    check_new_folder(out)
    check_shard_size(max_shard_size)
    folder = resolve_model(str(model), pickles=allow_pickle)
    pickled = allow_pickle and only_pickles(folder)
    base: Mapping[str, Any] = _pickled_base(folder) if pickled else check_weights(folder)
    skeleton = _skeleton(folder, nha)
    check_tensors(folder, base, skeleton)
    for _ in carried_files(folder):  # each is checked as it is named
        pass
    left_out = _left_out(base, skeleton) if pickled else []
    base = {name: tensor for name, tensor in base.items() if name not in left_out}
    size = sum(tensor_bytes(tensor.dtype, tensor.shape) for tensor in base.values())
    _check_space(folder, out, size, copies=copy or pickled or max_shard_size is not None)
    try:
        with terminable(), work_folder(out) as work, _progress(size, quiet) as advance:
            where = _write_base(base, work, copy, max_shard_size, advance)
            new = write_gates(work, where, skeleton, nha, seed, max_shard_size or "5GB")
            _write_index(work, where | new)
            skeleton.config.save_pretrained(work)
            add_code(work)
            carry_files(folder, work)
    except OSError as error:
        raise WorkError(f"{out}: could not be written ({error}); nothing was left there, swap again") from error
    except KeyboardInterrupt:
        raise WorkError(f"{out}: interrupted; nothing was left there, swap again") from None
    windows = skeleton.config.nha_windows
    return {
        "out": str(out),
        "layers": len(windows),
        "nha_layers": [index for index, window in enumerate(windows) if window is not None],
        "base_tensors": len(base),
        "new_tensors": len(new),
        "new_parameters": sum(math.prod(tensor.shape) for tensor in new.values()),
        "bytes": sum(path.stat().st_size for path in out.glob("*.safetensors")),
        "left_out": left_out,
    }


def _pickled_base(folder: Path) -> dict[str, PickledTensor]:
    config = checked_config(folder)
    tensors = pickled_tensors(folder)
    compare_sizes(folder, config, tensors)
    return tensors


def _skeleton(folder: Path, nha: NHASettings) -> Any:
    """The student without memory for its tensors."""
    try:
        config = nha_config(load_base_config(folder), nha)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except InputError:
        raise
    except Exception as error:  # transformers raises many unrelated classes over a config's values
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise InputError(
            f"{folder / 'config.json'}: no model can be made of it ({type(error).__name__}: {shown(reason)}); "
            "fetch it again"
        ) from error


def _left_out(base: Mapping[str, Any], skeleton: Any) -> list[str]:
    """Pickled tensors that are not written: what the model has no place for, and the second name of a tied one."""
    expected = expected_shapes(skeleton)
    tied = {
        name: base[source]
        for name, source in getattr(skeleton, "all_tied_weights_keys", {}).items()
        if name in base and source in base
    }
    again = [
        name for name, one in tied.items() if (base[name].path, base[name].storage) == (one.path, one.storage)
    ]
    return sorted(set(base) - set(expected) | set(again))


def _check_space(folder: Path, out: Path, size: int, copies: bool) -> None:
    """Whether what is to be copied fits.

    Raises:
        InputError: it does not.
    """
    place = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if size > free and (copies or folder.resolve().stat().st_dev != place.stat().st_dev):
        raise InputError(
            f"{out}: {size / 1e9:.1f} GB are to be written, {free / 1e9:.1f} GB are free there; make room, or choose a "
            "folder on another disk (on the model's own, shards are linked and take no room)"
        )


@contextmanager
def _progress(size: int, quiet: bool) -> Iterator[Advance]:
    """A bar over the bytes of all shards, on a terminal."""
    columns = (TextColumn("weights"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=quiet or not sys.stderr.isatty()) as bar:
        task = bar.add_task("weights", total=size)
        yield lambda done: bar.advance(task, done)


def _write_base(
    base: Mapping[str, Any], work: Path, copy: bool, max_shard_size: str | None, advance: Advance
) -> dict[str, StoredTensor]:
    """The base tensors in `work`, by name."""
    if any(isinstance(tensor, PickledTensor) for tensor in base.values()):
        files = convert_pickles(base, work, max_shard_size, advance)
    elif max_shard_size is not None:
        files = cut_anew(base, work, max_shard_size, advance)
    else:
        files = link_or_copy(base, work, copy, advance)
    return {name: tensor for file in files for name, tensor in read_header(work / file).items()}


def _write_index(work: Path, tensors: Mapping[str, StoredTensor]) -> None:
    index = {
        "metadata": {"total_size": sum(tensor.end - tensor.start for tensor in tensors.values())},
        "weight_map": {name: tensors[name].path.name for name in sorted(tensors)},
    }
    (work / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
