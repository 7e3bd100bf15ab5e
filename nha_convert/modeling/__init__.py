"""NHA model classes; importing this registers them with `transformers`' auto classes.

`NHA<Family>Config`, `NHA<Family>Model` and `NHA<Family>ForCausalLM` of every family are attributes of this package.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .attention_nha import NHAGate, branch_mode, nha_layers, teacher_mode
from .configuration_nha import CONFIGS
from .modeling_nha import MODELS

for _model_type, _config in CONFIGS.items():
    _model, _language_model = MODELS[_model_type]
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForCausalLM.register(_config, _language_model, exist_ok=True)
    globals().update({made.__name__: made for made in (_config, _model, _language_model)})

__all__ = ["CONFIGS", "MODELS", "NHAGate", "branch_mode", "nha_layers", "teacher_mode"]
