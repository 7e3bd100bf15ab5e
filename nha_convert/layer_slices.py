"""A few layers of a base model at a time, as a student of their own, read from the model's files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.utils import logging

from .errors import InputError
from .families import FAMILIES
from .modeling import CONFIGS, MODELS
from .weights.weight_files import stored_tensors

EMBEDDING, LAYERS = "model.embed_tokens.weight", "model.layers."


class LayerSlices:
    """The layers of a student whose base tensors stay in their files until they are asked for.

    Args:
        folder: of the base model.
        config: of the whole student, with its present `nha_windows`.
        dtype: of the base tensors.
    """

    def __init__(self, folder: Path, config: Any, dtype: torch.dtype) -> None:
        self.folder, self.config, self.dtype = Path(folder), config, dtype
        self.stored = stored_tensors(self.folder)

    def __len__(self) -> int:
        return int(self.config.num_hidden_layers)

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """What enters the first layer: [B, T] token ids -> [B, T, hidden] on the CPU; rows that are not asked for stay
        on disk.
        """
        with safe_open(self._file(EMBEDDING), "pt") as file:
            table = file.get_tensor(EMBEDDING)  # mapped, not read
            return table[input_ids.cpu()].to(self.dtype)

    def load(self, first: int, count: int, gates: Mapping[str, torch.Tensor], device: torch.device) -> Any:
        """Layers `first` to `first + count - 1` as a student, in eval mode, whose output is that of its last layer.

        It has a vocabulary of one and neither a final norm nor a head; it takes `inputs_embeds`. Layers count from 0.

        Args:
            gates: all parameters of the student that its base model lacks, under the names they have there.
            device: where to put it.
        Raises:
            InputError: a tensor of these layers is missing.
        """
        hidden = self.config.hidden_size
        content = {
            EMBEDDING: torch.zeros(1, hidden, dtype=self.dtype),
            "lm_head.weight": torch.zeros(1, hidden, dtype=self.dtype),
            "model.norm.weight": torch.ones(hidden, dtype=self.dtype),
        }
        for name in self.stored:
            if (renamed := _within(name, first, count)) is not None:
                with safe_open(self._file(name), "pt") as file:
                    content[renamed] = file.get_tensor(name)
        for name, tensor in gates.items():
            if (renamed := _within(name, first, count)) is not None:
                content[renamed] = tensor.detach().cpu().clone()
        model = self._made(sliced_config(self.config, first, count), content)
        decoder = getattr(model, model.base_model_prefix)
        decoder.norm = nn.Identity()
        return model.requires_grad_(False).eval().to(device)

    def _file(self, name: str) -> Path:
        if name not in self.stored:
            raise InputError(f"{self.folder}: the weights lack {name}; the folder is incomplete: fetch it again")
        return self.stored[name].path

    def _made(self, config: Any, content: dict[str, torch.Tensor]) -> Any:
        family = config.model_type.removeprefix("nha_")
        verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            model, report = MODELS[family][1].from_pretrained(
                None, config=config, state_dict=content, dtype=self.dtype, output_loading_info=True
            )
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()
        if report["missing_keys"]:
            lost = ", ".join(sorted(report["missing_keys"])[:3])
            raise InputError(
                f"{self.folder}: the weights of some layers lack {lost} (counted from the first of these layers); the "
                "folder is incomplete: fetch it again"
            )
        return model


def _within(name: str, first: int, count: int) -> str | None:
    """A tensor's name in the slice, or None where it is of another layer or of none."""
    index, dot, rest = name.removeprefix(LAYERS).partition(".")
    if not name.startswith(LAYERS) or not dot or not first <= int(index) < first + count:
        return None
    return f"{LAYERS}{int(index) - first}.{rest}"


def sliced_config(config: Any, first: int, count: int) -> Any:
    """The configuration of a student that has layers `first` to `first + count - 1` alone, and one word."""
    fields: dict[str, Any] = config.to_dict()
    for key in ("model_type", "architectures", "transformers_version", "auto_map", "dtype"):
        fields.pop(key, None)
    layers = range(first, first + count)
    fields |= {
        "num_hidden_layers": count,
        "nha_windows": [config.nha_windows[index] for index in layers],
        "nha_slots": [config.slots_of(index) for index in layers],
        "vocab_size": 1,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),
        "tie_word_embeddings": False,
    }
    if fields.get("layer_types"):
        fields["layer_types"] = [fields["layer_types"][index] for index in layers]
    if fields.get("num_experts"):
        dense, step = fields.get("mlp_only_layers") or [], fields.get("decoder_sparse_step", 1)
        sparse = [index not in dense and (index + 1) % step == 0 for index in layers]
        fields |= {"decoder_sparse_step": 1, "mlp_only_layers": [i for i, there in enumerate(sparse) if not there]}
    family = config.model_type.removeprefix("nha_")
    assert family in FAMILIES
    sliced = CONFIGS[family](**fields)
    sliced._attn_implementation = config._attn_implementation
    return sliced
