"""What the swap does to a model in memory."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.utils import logging

from .errors import InputError
from .gate_init import init_gates
from .model_files import check_family, check_windows
from .modeling import CONFIGS
from .modeling.attention_nha import nha_layers
from .settings import NHASettings
from .weights.weight_files import check_weights


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
    windows = nha.windows(base_config.num_hidden_layers)
    nha.slots_by_layer(base_config.num_hidden_layers)
    check_windows(name, fields, windows)
    for key in ("model_type", "architectures", "transformers_version", "auto_map"):
        fields.pop(key, None)
    config = CONFIGS[family](
        **fields,
        nha_windows=windows,
        nha_slots=nha.slots,
        nha_sinks=nha.sinks,
        nha_gate=nha.gate,
        nha_tau=nha.tau,
        nha_slot_query_scale=nha.slot_query_scale,
        nha_slot_bias=nha.slot_bias,
        nha_slot_rotary=nha.slot_rotary,
        nha_mask_empty=nha.mask_empty,
    )
    config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]
    config.name_or_path = name
    return config


def load_base_config(folder: Path) -> PretrainedConfig:
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    check_family(str(folder), raw)
    return AutoConfig.from_pretrained(folder)


def new_parameter_names(model: nn.Module) -> set[str]:
    """Names of the parameters that the base model does not have."""
    gates = {id(parameter) for _, attention in nha_layers(model) for parameter in attention.nha.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in gates}


def load_student(
    model: Path, nha: NHASettings, *, dtype: torch.dtype | None = None, seed: int = 0, length: int | None = None
) -> Any:
    """Load a base model as a student: its own tensors, plus initialised gates.

    Gates that start from text (`settings_types.NEEDS_TEXT`) are as `horizons` makes them, until `calibrate_gates`.

    Args:
        model: folder of the base model.
        dtype: of the backbone; None keeps the checkpoint's. Gates are fp32 in any case.
        seed: of the gates.
        length: tokens of a training row, for the gates' horizons.
    Returns:
        the language model, in eval mode.
    Raises:
        InputError: unsupported family, damaged weights, or weights that lack a tensor of the base model.
    """
    folder = Path(model)
    check_weights(folder)  # sizes first: nothing is made of a config that no model can have
    config = nha_config(load_base_config(folder), nha)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the loading report warns of the new parameters, which are checked below
    try:
        student, report = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype or "auto", output_loading_info=True, ignore_mismatched_sizes=True
        )
    except RuntimeError as error:
        if "conversion" not in str(error):
            raise
        raise InputError(
            f"{folder}: the weights of its experts cannot be joined as config.json says; some are missing or of "
            f"another model: fetch it again (`nha-convert swap {folder} OUT` names them)"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    check_shapes(folder, report["mismatched_keys"])
    check_missing(folder, set(report["missing_keys"]), new_parameter_names(student))
    init_gates(student, nha.gate_init, seed=seed, ends=nha.gate_horizons, length=length)
    return student


def check_shapes(folder: Path, mismatched: Iterable[tuple[str, Any, Any]]) -> None:
    """Every tensor on disk has the shape that config.json gives it."""
    wrong = sorted((name, list(found), list(wanted)) for name, found, wanted in mismatched)
    if wrong:
        raise InputError(
            "\n".join(
                f"{folder}: {name} has shape {found}, but config.json makes it {wanted}; weights and configuration are "
                "of different models"
                for name, found, wanted in wrong[:10]
            )
        )


def check_missing(folder: Path, missing: set[str], new: set[str]) -> None:
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
