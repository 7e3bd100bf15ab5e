"""Serves one checkpoint with transformers' own OpenAI-compatible server.

`transformers serve` looks a model's class up in the `transformers` module and lists the Hub's cache as its models. Here
the classes of this package are put where it looks, and the one folder is what it lists and loads.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import socket
import sys
from pathlib import Path
from typing import Any

import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer
from transformers.cli.serve import Serve
from transformers.cli.serving import model_manager

from . import modeling  # noqa: F401  (registers the NHA classes)
from .devices import find_device
from .errors import InputError

NEEDED = ("fastapi", "uvicorn", "openai")
DTYPES = ("auto", "float32", "bfloat16", "float16")
INSTALL = "pip install 'nha-convert[serve]'"


class OneModelManager(model_manager.ModelManager):
    """transformers' model manager, for the folder that the server was started with and no other."""

    def load_model_and_processor(self, model_id_and_revision: str, *args: Any, **options: Any) -> Any:
        """The loaded model and its tokenizer.

        Raises:
            ValueError: another model was asked for.
        """
        if model_id_and_revision != self.process_model_name(self.force_model):
            raise ValueError(f"this server has one model: {self.force_model}")
        return super().load_model_and_processor(model_id_and_revision, *args, **options)

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        """What /v1/models lists."""
        created = int((Path(self.force_model) / "config.json").stat().st_mtime)
        return [{"id": self.force_model, "object": "model", "created": created, "owned_by": "nha-convert"}]


def serve_checkpoint(
    folder: Path, *, host: str = "localhost", port: int = 8000, device: str = "auto", dtype: str = "auto"
) -> None:
    """Answer requests until interrupted, one after the other.

    Args:
        folder: checkpoint with its tokenizer; its name as given here is the model's name in requests.
        port: 1 to 65535.
        device: auto, cpu, mps, cuda or cuda:N.
        dtype: of the backbone, one of `DTYPES`; auto is the checkpoint's own. Gates and slots stay fp32.
    Raises:
        InputError: the server's packages are missing, the port is taken, there is no such device or dtype, or the
            folder cannot be loaded or named in a request.
    """
    _check_packages()
    if dtype not in DTYPES:
        raise InputError(f"--dtype {dtype}: one of {', '.join(DTYPES)} is needed")
    place = find_device(device)
    _check_name(folder)
    _check_address(host, port)
    chat_template = _prepare(folder).chat_template
    if not chat_template:
        print(
            f"{folder}: its tokenizer has no chat template, so /v1/chat/completions and /v1/responses answer with an "
            f"error; /v1/completions works. A template is read from {folder / 'chat_template.jinja'}",
            file=sys.stderr,
        )
    print(f"model {folder} at http://{host}:{port}/v1", file=sys.stderr, flush=True)
    try:
        Serve(force_model=str(folder), device=str(place), dtype=dtype, host=host, port=port)
    except KeyboardInterrupt:
        return
    except (OSError, ValueError) as error:
        raise _unloadable(folder, error) from error


def _check_packages() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"serve: {', '.join(missing)} not installed; install what the server needs: {INSTALL}")


def _check_name(folder: Path) -> None:
    if "@" in str(folder):
        raise InputError(
            f"{folder}: the server reads what follows `@` as a revision; give a path without it: "
            f"ln -s '{folder.resolve()}' model && nha-convert serve model"
        )


def _check_address(host: str, port: int) -> None:
    """Find out before the model is loaded whether the server could listen there."""
    try:
        places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise InputError(f"--host {host}: no address of this machine ({error}); use localhost or 0.0.0.0") from error
    refused: list[OSError] = []
    for family, kind, protocol, _, address in places:
        try:
            with socket.socket(family, kind, protocol) as probe:
                if os.name == "posix":
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except OSError as error:
            refused.append(error)
    if any(error.errno == errno.EADDRINUSE for error in refused):
        raise InputError(f"--port {port}: is in use on {host}; give another: --port {port % 65535 + 1}")
    if len(refused) == len(places):
        raise InputError(f"--host {host} --port {port}: cannot listen there ({refused[0].strerror})")


def _prepare(folder: Path) -> Any:
    """Put the model's class and our manager where the server looks; return the tokenizer.

    Raises:
        InputError: no language model, or no tokenizer.
    """
    try:
        config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise _unloadable(folder, error) from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(f"{folder}: config.json has model_type {config.model_type!r}, which is no language model")
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    setattr(transformers, model_class.__name__, model_class)
    model_manager.ModelManager = OneModelManager
    return tokenizer


def _unloadable(folder: Path, error: Exception) -> InputError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return InputError(f"{folder}: cannot be loaded: {reason}")
