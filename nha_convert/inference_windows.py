"""Windows of a loaded model, from the settings of a command: `--set nha.window=…` at inference."""

from __future__ import annotations

from typing import Any

from .errors import InputError
from .modeling.attention_nha import nha_layers
from .settings import NHASettings


def change_windows(model: Any, nha: NHASettings) -> None:
    """Give a loaded model the windows that `nha` sets; what it does not set stays as it is.

    Args:
        model: an NHA model.
        nha: only `window` and `full_attention_layers` may be set. A single window is for the layers that have gates;
            layers that stay the base model's own attention stay so.
    Raises:
        InputError: the model has no NHA layers, or the windows do not fit it.
    """
    converted = {index for index, _ in nha_layers(model)}
    if not converted:
        raise InputError("--set nha.window: this model has no NHA layers; convert it first: nha-convert swap MODEL OUT")
    given = nha.model_fields_set
    present = [window if layer in converted else "full" for layer, window in enumerate(model.config.nha_windows)]
    wanted = nha.model_copy(update={} if "window" in given else {"window": present})
    each = ["full" if window is None else window for window in wanted.windows(len(present))]
    if "window" in given and not isinstance(nha.window, list):
        each = [window if layer in converted else "full" for layer, window in enumerate(each)]
    try:
        model.set_windows(each)
    except ValueError as error:
        raise InputError(f"--set nha.window: {error}") from error
