"""A student whose base tensors stay on disk: each is read when its module computes, and let go after."""

from __future__ import annotations

from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from .convert import check_missing, check_shapes, load_base_config, new_parameter_names, nha_config
from .gate_init import layer_horizons, layer_seed, refuse_text
from .modeling.attention_nha import nha_layers
from .settings import NHASettings
from .weights.gate_shards import layer_gates
from .weights.weight_files import check_weights


def load_streamed(
    folder: Path,
    nha: NHASettings,
    *,
    dtype: torch.dtype,
    device: torch.device,
    scratch: Path,
    seed: int = 0,
    length: int | None = None,
) -> Any:
    """`load_student` without memory for the base tensors: it computes the same, more slowly.

    Args:
        folder: of the base model.
        dtype: of the base tensors; gates are fp32.
        device: where it computes; takes one module at a time.
        scratch: an empty folder, kept as long as the model, for tensors that its files hold in another form (the
            experts of a mixture).
        seed: of the gates.
        length: tokens of a training row, for the gates' horizons.
    Returns:
        the language model, in eval mode; gates are real parameters on `device`, base tensors on the meta device.
    Raises:
        InputError: unsupported family, damaged weights, weights that lack a tensor of the base model, or gates that
            start from text.
    """
    refuse_text(nha, "with runtime.layers_at_once the model is never in memory as a whole")
    folder = Path(folder)
    stored = check_weights(folder)
    config = nha_config(load_base_config(folder), nha)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    getLogger("accelerate.big_modeling").setLevel("ERROR")  # it warns of what is asked for here
    try:
        student, report = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            device_map=_places(skeleton, device),
            offload_folder=str(scratch),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    finally:
        logging.set_verbosity(verbosity)
    check_shapes(folder, report["mismatched_keys"])
    check_missing(folder, set(report["missing_keys"]), new_parameter_names(student))
    _start_gates(student, stored, nha, dtype, seed, length)
    return student.eval()


def is_streamed(model: Any) -> bool:
    """Whether some of a model's tensors are read from disk as it computes."""
    return "disk" in (getattr(model, "hf_device_map", None) or {}).values()


def _places(skeleton: Any, device: torch.device) -> dict[str, Any]:
    """Gates on the device; every other module that has tensors of its own on disk."""
    places: dict[str, Any] = {}
    for name, module in skeleton.named_modules():
        if name.endswith(".nha"):
            places[name] = str(device)
        elif ".nha." not in name and list(module.parameters(recurse=False)):
            places[name] = "disk"
    return places


@torch.no_grad()
def _start_gates(
    student: Any, stored: Any, nha: NHASettings, dtype: torch.dtype, seed: int, length: int | None
) -> None:
    """Gates as `init_gates` makes them, from the stored W_k in the model's dtype."""
    modules = {id(module): name for name, module in student.named_modules()}
    for index, attention in nha_layers(student):
        key = f"{modules[id(attention)]}.k_proj.weight"
        with safe_open(stored[key].path, "pt") as file:
            tensors = layer_gates(
                attention.nha,
                file.get_tensor(key).to(dtype),
                nha.gate_init,
                layer_seed(seed, index),
                layer_horizons(attention.nha_window, nha.gate_horizons, length),
            )
        for name, parameter in attention.nha.named_parameters():
            parameter.copy_(tensors[name])
