"""One exported folder for all tests here."""

from pathlib import Path

import pytest

from tests.serving.served import make_folder


@pytest.fixture(scope="session")
def served_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported folder of the embedded teacher with a chat template."""
    return make_folder(tmp_path_factory.mktemp("served") / "model")
