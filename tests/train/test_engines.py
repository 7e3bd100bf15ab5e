"""One process, DDP and FSDP2 compute the same step, whatever the cut; plans deal every row out once."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import KINDS, ROWS, recipe_of, step

from nha_convert.errors import InputError
from nha_convert.train.batches import plan_batches
from nha_convert.train.engine import Engine, start_engine

HERE = Path(__file__).resolve().parent
BOUND = 1e-5


def environment(**more: str) -> dict[str, str]:
    """For subprocesses: our paths, one thread each."""
    paths = [os.environ.get("PYTHONPATH", ""), str(HERE.parents[1]), str(HERE.parents[1] / "kernels"), str(HERE)]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **more}


def torchrun(ranks: int, *arguments: str, timeout: int = 600) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *arguments]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=timeout)


def difference(found: dict[str, Any], wanted: dict[str, Any]) -> float:
    """The largest relative difference of losses, and of gradients against each tensor's largest entry."""
    assert found["loss"].keys() == wanted["loss"].keys() and found["gradients"].keys() == wanted["gradients"].keys()
    assert found["items"] == wanted["items"] == list(range(ROWS))
    differences = [abs(found["loss"][name] - value) / abs(value) for name, value in wanted["loss"].items()]
    for name, gradient in wanted["gradients"].items():
        assert gradient.abs().max() > 0, name
        differences.append(((found["gradients"][name] - gradient).abs().max() / gradient.abs().max()).item())
    return max(differences)


@pytest.fixture(scope="module")
def alone(pico_llama: Path) -> dict[str, Any]:
    """Each kind's step by one process, all rows in one batch."""
    return {kind: step(pico_llama, recipe_of(stage), Engine()) for kind, stage in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("micro", [1, 3])
def test_any_cut_of_the_batch_is_the_same_step(pico_llama: Path, alone: dict[str, Any], kind: str, micro: int) -> None:
    found = step(pico_llama, recipe_of(KINDS[kind], micro_batch=micro), Engine())
    assert difference(found, alone[kind]) <= BOUND


@pytest.mark.slow
def test_two_ranks_are_the_same_step(pico_llama: Path, alone: dict[str, Any], tmp_path: Path) -> None:
    """DDP and FSDP2 over gloo, whole and cut, against one process."""
    done = torchrun(2, str(HERE / "ranks.py"), str(pico_llama), str(tmp_path / "found.pt"))
    assert done.returncode == 0, done.stderr[-4000:]
    found = torch.load(tmp_path / "found.pt", weights_only=False)
    assert len(found) == 4 * len(KINDS)
    for (kind, name, micro), result in found.items():
        assert difference(result, alone[kind]) <= BOUND, (kind, name, micro)


@given(rows=st.integers(1, 40), ranks=st.integers(1, 5), micro=st.one_of(st.none(), st.integers(1, 9)))
def test_a_plan_deals_every_row_out_once(rows: int, ranks: int, micro: int | None) -> None:
    try:
        plan = plan_batches(rows, ranks, micro)
    except InputError as error:
        assert "batch_size" in str(error) and rows < ranks * -(-rows // (ranks * (micro or rows)))
        return
    for number in (0, 3):
        pieces = [plan.pieces(number, rank) for rank in range(ranks)]
        dealt = [item for piece in pieces for micro_batch in piece for item in micro_batch]
        assert dealt == list(range(number * rows, (number + 1) * rows))
        sizes = [len(micro_batch) for piece in pieces for micro_batch in piece]
        assert min(sizes) >= 1 and max(sizes) <= min(sizes) + 1
        assert micro is None or max(sizes) <= micro


def test_an_engine_that_cannot_be_is_refused() -> None:
    cpu = torch.device("cpu")
    with pytest.raises(InputError, match=r"runtime.cpu_offload: needs runtime.engine fsdp2 on a GPU, found single"):
        start_engine(recipe_of(KINDS["align"], cpu_offload=True).runtime, cpu)
    with pytest.raises(InputError, match=r"runtime.engine: fsdp2 runs on cuda or cpu, found mps"):
        start_engine(recipe_of(KINDS["align"], engine="fsdp2").runtime, torch.device("mps"))
