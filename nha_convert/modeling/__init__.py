"""NHA model classes; importing this registers them with `transformers`' auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .attention_nha import NHAGate, branch_mode, nha_layers, teacher_mode
from .configuration_nha import NHALlamaConfig, NHAQwen2Config, NHAQwen3Config
from .modeling_nha import (
    NHALlamaForCausalLM,
    NHALlamaModel,
    NHAQwen2ForCausalLM,
    NHAQwen2Model,
    NHAQwen3ForCausalLM,
    NHAQwen3Model,
)

for _config, _model, _language_model in (
    (NHALlamaConfig, NHALlamaModel, NHALlamaForCausalLM),
    (NHAQwen2Config, NHAQwen2Model, NHAQwen2ForCausalLM),
    (NHAQwen3Config, NHAQwen3Model, NHAQwen3ForCausalLM),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForCausalLM.register(_config, _language_model, exist_ok=True)

__all__ = [
    "NHAGate",
    "NHALlamaConfig",
    "NHALlamaForCausalLM",
    "NHALlamaModel",
    "NHAQwen2Config",
    "NHAQwen2ForCausalLM",
    "NHAQwen2Model",
    "NHAQwen3Config",
    "NHAQwen3ForCausalLM",
    "NHAQwen3Model",
    "branch_mode",
    "nha_layers",
    "teacher_mode",
]
