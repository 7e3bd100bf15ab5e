"""What the swap does to a model in memory, and to a checkpoint on disk without loading it."""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from rich.console import Console
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.utils import logging

from .errors import InputError
from .gate_init import gate_parameters, init_gates, layer_seed
from .model_files import check_family, check_safetensors, local_folder
from .modeling import NHALlamaConfig, NHAQwen2Config, NHAQwen3Config
from .modeling.attention_nha import nha_layers
from .remote_code import add_code
from .settings import NHASettings

CONFIGS: dict[str, Any] = {"llama": NHALlamaConfig, "qwen2": NHAQwen2Config, "qwen3": NHAQwen3Config}
WEIGHTS, INDEX, NEW_WEIGHTS = "model.safetensors", "model.safetensors.index.json", "model-nha.safetensors"
BASE_WEIGHTS = "model-base.safetensors"  # `model.safetensors` would be read in place of the index
MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*"]
CHAT_TEMPLATES = "additional_chat_templates"


def resolve_model(name: str) -> Path:
    """The folder of a model: a local one, the embedded teacher, or a Hub id's snapshot (the local cache first).

    Raises:
        InputError: no such folder, or the Hub id is neither in the cache nor to be had.
    """
    folder = local_folder(name)
    if folder is not None:
        return folder
    try:
        snapshot = Path(snapshot_download(name, allow_patterns=MODEL_FILES, local_files_only=True))
        if not _lacks_files(snapshot):
            return snapshot
    except (OSError, ValueError):  # not in the cache
        pass
    try:
        snapshot = Path(snapshot_download(name, allow_patterns=MODEL_FILES))
        if _lacks_files(snapshot):
            raise FileNotFoundError(f"{snapshot} lacks config.json or some of its safetensors")
        return snapshot
    except Exception as error:  # the Hub client raises many unrelated classes; each means: not to be had
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        offline = (
            " HF_HUB_OFFLINE is set, so only the local cache was read;" if os.environ.get("HF_HUB_OFFLINE") else ""
        )
        raise InputError(
            f"{name}: not in the local cache and the Hub did not give it ({reason});{offline} "
            f"fetch it with `hf download {name}`, or give a local folder"
        ) from error


def _lacks_files(folder: Path) -> bool:
    """Whether a snapshot is without its config or one of its shards (a cache may hold a part of a model)."""
    if not (folder / "config.json").is_file():
        return True
    if (folder / INDEX).is_file():
        shards = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        return not all((folder / shard).is_file() for shard in shards)
    return not (folder / WEIGHTS).is_file()


def nha_config(base_config: PretrainedConfig, nha: NHASettings) -> Any:
    """The student's configuration: the base model's, plus the settings.

    Raises:
        InputError: the family is not supported, the model is quantised, or the settings do not fit its layers.
    """
    name = getattr(base_config, "name_or_path", "") or "model"
    family = check_family(name, {"model_type": base_config.model_type})
    if getattr(base_config, "quantization_config", None):
        raise InputError(
            f"{name}: its weights are quantised (quantization_config in config.json), so gates cannot be derived and "
            "trained from them; name the unquantised model"
        )
    fields = base_config.to_dict()
    for key in ("model_type", "architectures", "transformers_version", "auto_map"):
        fields.pop(key, None)
    config = CONFIGS[family](
        **fields,
        nha_windows=nha.windows(base_config.num_hidden_layers),
        nha_slots=nha.slots,
        nha_sinks=nha.sinks,
        nha_tau=nha.tau,
        nha_slot_query_scale=nha.slot_query_scale,
        nha_slot_bias=nha.slot_bias,
        nha_mask_empty=nha.mask_empty,
    )
    config.architectures = [f"{CONFIGS[family].__name__.removesuffix('Config')}ForCausalLM"]
    config.name_or_path = name
    return config


def _base_config(folder: Path) -> PretrainedConfig:
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    check_family(str(folder), raw)
    return AutoConfig.from_pretrained(folder)


def new_parameter_names(model: nn.Module) -> set[str]:
    """Names of the parameters that the base model does not have."""
    gates = {id(parameter) for _, attention in nha_layers(model) for parameter in attention.nha.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in gates}


def load_student(model: Path, nha: NHASettings, *, dtype: torch.dtype | None = None, seed: int = 0) -> Any:
    """Load a base model as a student: its own tensors, plus initialised gates.

    Args:
        model: folder of the base model.
        dtype: of the backbone; None keeps the checkpoint's. Gates are fp32 in any case.
        seed: of the gates.
    Returns:
        the language model, in eval mode.
    Raises:
        InputError: unsupported family, damaged weights, or weights that lack a tensor of the base model.
    """
    folder = Path(model)
    config = nha_config(_base_config(folder), nha)
    check_safetensors(folder)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the loading report warns of the new parameters, which are checked below
    try:
        student, report = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype or "auto", output_loading_info=True
        )
    finally:
        logging.set_verbosity(verbosity)
    _check_missing(folder, set(report["missing_keys"]), new_parameter_names(student))
    init_gates(student, nha.gate_init, seed=seed)
    return student


def _check_missing(folder: Path, missing: set[str], new: set[str]) -> None:
    """Exactly the new parameters may be missing from a base model's weights."""
    lost = sorted(missing - new)
    if lost:
        raise InputError(
            f"{folder}: the weights lack {len(lost)} tensors of the base model ({', '.join(lost[:3])}); "
            "the folder is incomplete or its config.json is of another model: fetch it again"
        )
    if new - missing:
        raise InputError(
            f"{folder}: the weights already hold NHA tensors ({', '.join(sorted(new - missing)[:3])}); "
            "name the model they were made from"
        )


def swap_checkpoint(
    model: Path | str, out: Path, nha: NHASettings, *, seed: int = 0, quiet: bool = False
) -> dict[str, Any]:
    """Write `model` with its attention swapped to `out`, one layer's W_k in memory at a time.

    Base shards are hard-linked (copied where that is impossible), so their tensors are byte-identical; the new ones
    stand in `model-nha.safetensors`. The folder appears under its name only when complete.

    Args:
        model: folder, Hub id or `embedded`.
        out: folder to make; may exist if empty.
    Returns:
        {"out", "layers", "nha_layers", "base_tensors", "new_tensors", "new_parameters", "bytes"}.
    Raises:
        InputError: `out` holds something, or the model is missing, damaged or of an unsupported family; nothing is
            written then.
    """
    out = Path(out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: exists and is not an empty folder; choose another, or empty it: rm -r {out}")
    folder = resolve_model(str(model))
    config = nha_config(_base_config(folder), nha)
    check_safetensors(folder)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    weight_map = _weight_map(folder)
    _check_tensors(folder, weight_map, skeleton)
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        new = _new_tensors(folder, weight_map, skeleton, nha, seed, quiet)
        report = _write_checkpoint(folder, work, weight_map, config, new)
        work.chmod(0o755)
        os.replace(work, out)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    swapped = [index for index, window in enumerate(config.nha_windows) if window is not None]
    return {"out": str(out), "layers": config.num_hidden_layers, "nha_layers": swapped, **report}


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> file name."""
    if (folder / INDEX).is_file():
        weight_map: dict[str, str] = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        return weight_map
    if not (folder / WEIGHTS).is_file():
        raise InputError(f"{folder}: holds neither {WEIGHTS} nor {INDEX}; save the model with save_pretrained first")
    with safe_open(folder / WEIGHTS, "pt") as file:
        return dict.fromkeys(file.keys(), WEIGHTS)


def _check_tensors(folder: Path, weight_map: dict[str, str], skeleton: nn.Module) -> None:
    """Compare names and shapes on disk with the student's.

    Raises:
        InputError: a tensor of the base model is missing or has another shape.
    """
    tied = set(getattr(skeleton, "all_tied_weights_keys", {}))
    expected = {name: list(tensor.shape) for name, tensor in skeleton.state_dict().items() if name not in tied}
    _check_missing(folder, set(expected) - set(weight_map), new_parameter_names(skeleton))
    for shard in sorted(set(weight_map.values())):
        with safe_open(folder / shard, "pt") as file:
            there = set(file.keys())
            for name in (name for name, where in weight_map.items() if where == shard):
                if name not in there:
                    raise InputError(f"{folder / shard}: lacks {name}, which the index puts there; fetch it again")
                shape = file.get_slice(name).get_shape()
                if name in expected and shape != expected[name]:
                    raise InputError(
                        f"{folder / shard}: {name} has shape {shape}, but config.json makes it {expected[name]}; "
                        "weights and configuration are of different models"
                    )


def _new_tensors(
    folder: Path, weight_map: dict[str, str], skeleton: nn.Module, nha: NHASettings, seed: int, quiet: bool
) -> dict[str, torch.Tensor]:
    """The tensors that the base model lacks, fp32, by their names in the student."""
    names = {id(module): name for name, module in skeleton.named_modules()}
    new: dict[str, torch.Tensor] = {}
    hidden = quiet or not sys.stderr.isatty()
    for index, attention in track(
        nha_layers(skeleton), description="gates", disable=hidden, console=Console(stderr=True)
    ):
        gate, prefix = attention.nha, names[id(attention)]
        key_name = f"{prefix}.k_proj.weight"
        with safe_open(folder / weight_map[key_name], "pt") as file:
            key_weight = file.get_tensor(key_name)
        weight, bias = gate_parameters(
            key_weight,
            nha.gate_init,
            groups=gate.groups,
            slots=gate.slots,
            tau=gate.tau,
            seed=layer_seed(seed, index),
        )
        new[f"{prefix}.nha.gate_proj.weight"], new[f"{prefix}.nha.gate_proj.bias"] = weight, bias
        if gate.slot_q_scale is not None:
            new[f"{prefix}.nha.slot_q_scale"] = torch.ones(gate.slot_q_scale.shape)
        if gate.slot_bias is not None:
            new[f"{prefix}.nha.slot_bias"] = torch.zeros(gate.slot_bias.shape)
    return new


def _write_checkpoint(
    folder: Path, work: Path, weight_map: dict[str, str], config: PretrainedConfig, new: dict[str, torch.Tensor]
) -> dict[str, int]:
    """Link the base shards, write the rest, and count."""
    renamed = {shard: BASE_WEIGHTS if shard == WEIGHTS else shard for shard in set(weight_map.values())}
    for shard, name in renamed.items():
        _link_or_copy(folder / shard, work / name)
    merged = {tensor: renamed[shard] for tensor, shard in weight_map.items()}
    if new:
        save_file({name: tensor.contiguous() for name, tensor in new.items()}, work / NEW_WEIGHTS, {"format": "pt"})
        merged |= dict.fromkeys(new, NEW_WEIGHTS)
    size = sum(path.stat().st_size for path in work.glob("*.safetensors"))
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(merged.items()))}
    (work / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    config.save_pretrained(work)
    add_code(work)
    carry_files(folder, work)
    return {
        "base_tensors": len(weight_map),
        "new_tensors": len(new),
        "new_parameters": sum(tensor.numel() for tensor in new.values()),
        "bytes": size,
    }


def carry_files(folder: Path, work: Path) -> None:
    """Copy what belongs to a model besides its weights and config: tokenizer, generation config, licence."""
    for path in sorted(folder.iterdir()):
        weights = path.name == "config.json" or path.name.endswith((".index.json", ".safetensors"))
        if path.is_file() and not weights and any(path.match(pattern) for pattern in MODEL_FILES):
            shutil.copyfile(path, work / path.name)
    if (folder / CHAT_TEMPLATES).is_dir():
        shutil.copytree(folder / CHAT_TEMPLATES, work / CHAT_TEMPLATES)


def _link_or_copy(source: Path, target: Path) -> None:
    source = source.resolve()  # the Hub's cache holds links to blobs
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
