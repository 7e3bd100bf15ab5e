"""Text to train on, and one uninterrupted run that the others are compared with."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from stages import make_recipe, train


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12,000 characters of words in random order."""
    rng = random.Random(0)
    words = ["".join(rng.choice("abcdefghij") for _ in range(rng.randint(2, 7))) for _ in range(40)]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(rng.choice(words) for _ in range(2200))[:12000])
    return path


@pytest.fixture(scope="session")
def uninterrupted(pico_llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Final tensors, summaries and folder of a run that nothing stopped."""
    threads = torch.get_num_threads()
    folder = tmp_path_factory.mktemp("uninterrupted")
    model, summaries = train(pico_llama, folder, make_recipe(text))
    torch.set_num_threads(threads)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return {"tensors": tensors, "summaries": summaries, "folder": folder, "model": model}
