"""Kernels compiled ahead of time, without a GPU: they compile, fit, keep their matrix products and do not spill.

In a process of its own, as this one runs kernels in Triton's interpreter, where all passes that the compiler refuses.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux alone")

ROOT = Path(__file__).resolve().parents[2]
PREFILL = {
    ("forward", "tile_states"),
    ("forward", "attend"),
    ("backward", "tile_states"),
    ("backward", "query_side"),
    ("backward", "reverse_scan"),
    ("backward", "key_side"),
    ("backward", "gate_side"),
}
DECODE = {("decode", "decode"), ("decode split", "decode"), ("decode split", "combine")}
SHARED = {"sm_90": 227 * 1024, "gfx942": 64 * 1024}
MATRIX = {"sm_90": {"wgmma", "mma.sync"}, "gfx942": {"mfma"}}


def compile_table(folder, *arguments, timeout):
    """Exit code, output and rows of the script, with a cache of its own."""
    env = os.environ | {"TRITON_CACHE_DIR": str(folder / "cache"), "NHA_COMMIT": "test"}
    command = [sys.executable, str(ROOT / "kernels/bench/compile_table.py"), "--out", str(folder / "out"), *arguments]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=timeout)
    path = folder / "out/compile.json"
    assert path.exists(), done.stderr
    return done.returncode, done.stdout + done.stderr, json.loads(path.read_text())["rows"]


@pytest.fixture(scope="module")
def main_case(tmp_path_factory):
    """The case of the acceptance limits on one target of each vendor."""
    arguments = ["--targets", "sm_90", "gfx942", "--cases", "d128-m64-bf16-recipe", "--check"]
    return compile_table(tmp_path_factory.mktemp("compile"), *arguments, timeout=600)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_every_kernel_keeps_its_limits(main_case, target):
    code, shown, rows = main_case
    assert code == 0, shown
    rows = [r for r in rows if r["target"] == target]
    assert {(r["of"], r["kernel"]) for r in rows} == PREFILL | DECODE
    for r in rows:
        name = f"{r['of']} {r['kernel']}"
        assert (r["error"], r["broken"]) == ("", []), name
        assert r["shared"] <= SHARED[target], name
        assert r["kernel"] == "combine" or r["dots"] > 0, name
        if r["dots"]:  # an empty kernel compiles without complaint
            assert r["matrix"] and set(r["matrix"]) <= MATRIX[target], name
        if r["of"] == "forward":
            assert r["spills"] == 0, name
        if r["of"] == "backward":
            assert r["spills"] <= 160, name


def test_results_name_what_was_compiled(main_case):
    _, shown, rows = main_case
    assert f"{len(rows)} kernels, 0 break a limit" in shown
    assert all(r["registers"] > 0 and r["seconds"] is not None for r in rows if r["of"] == "forward")


def test_a_glob_that_fits_nothing_is_wrong_input(tmp_path):
    command = [sys.executable, str(ROOT / "kernels/bench/compile_table.py"), "--cases", "nothing", "--out", tmp_path]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "d128-m64-bf16-recipe" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_whole_table_keeps_its_limits(tmp_path):
    code, shown, _ = compile_table(tmp_path, "--check", timeout=3600)
    assert code == 0, shown
