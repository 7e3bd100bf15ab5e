"""The progress line, and the libraries that also receive the rows."""

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from stages import make_recipe, train

from nha_convert.train.progress import StageProgress, layer_errors, short, sparkline


def test_the_line_says_stage_steps_loss_rate_and_worst_layer() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=160, color_system=None)
    progress = StageProgress("01-align", 9, 3, quiet=False, console=console)
    progress.step()
    progress.row({"loss": 0.25, "align/layer_00": 0.1, "align/layer_07": 0.4}, 12_345.0)
    progress.close()
    last = [line for line in screen.getvalue().splitlines() if "01-align" in line][-1]
    for part in ("01-align", "4/9", "loss 0.25", "12.3k tok/s", "worst layer 7: 0.4"):
        assert part in last, (part, last)


@pytest.mark.parametrize("quiet", [True, False])
def test_nothing_is_drawn_without_wish_or_terminal(quiet: bool) -> None:
    screen = io.StringIO()
    progress = StageProgress("s", 2, quiet=quiet, console=Console(file=screen, force_terminal=quiet))
    progress.step()
    progress.row({"loss": 1.0}, 1.0)
    progress.close()
    assert screen.getvalue() == ""


def test_layers_and_rates_in_short() -> None:
    assert sparkline([0.0, 0.5, 0.99, 1.5, float("nan")]) == "▁▅███"
    assert layer_errors({"loss": 1.0, "memory/layer_00": 0.9}) == ""
    assert layer_errors({"align/layer_00": 0.5, "align/layer_01": float("nan")}).endswith("worst layer 1: nan")
    assert [short(number) for number in (12, 12_345, 3_200_000)] == ["12", "12.3k", "3.2M"]


def test_rows_go_to_tensorboard(pico_llama: Path, text: Path, tmp_path: Path) -> None:
    """Through Trainer's integration, read back with tensorboard's own reader."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = make_recipe(text, runtime={"device": "cpu", "logging_steps": 3, "report_to": "tensorboard"})
    train(pico_llama, tmp_path, recipe)
    places = {path.parent for path in tmp_path.rglob("events.out.tfevents.*")}
    assert places
    found: dict[str, Any] = {}
    for place in places:
        events = EventAccumulator(str(place)).Reload()
        found |= {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    losses = next(values for tag, values in found.items() if tag.endswith("01-align/loss"))
    assert [step for step, _ in losses] == [1, 3, 6, 9]
    assert any(tag.endswith("01-align/align/layer_01") for tag in found)
    assert any(tag.endswith("02-distill/kl") for tag in found)


def test_the_installed_line_draws_on_stderr_alone() -> None:
    """A real pseudo-terminal on stderr: the line is there, and stdout stays empty."""
    pty = pytest.importorskip("pty")
    code = (
        "from nha_convert.train.progress import StageProgress as P\n"
        "p = P('01-align', 2, quiet=False); p.step(); p.row({'loss': 0.5}, 10.0); p.close()"
    )
    leader, follower = pty.openpty()
    root = Path(__file__).resolve().parents[2]
    paths = os.pathsep.join([str(root), str(root / "kernels")])
    env = os.environ | {"PYTHONPATH": paths, "TERM": "xterm", "COLUMNS": "120"}
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=follower, env=env)
    os.close(follower)
    drawn = os.read(leader, 65536).decode(errors="replace")
    os.close(leader)
    assert done.returncode == 0 and done.stdout == b"" and "01-align" in drawn and "loss 0.5" in drawn
