"""The timings' script at toy sizes: what it writes, what it refuses, and the floors."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from bench import contenders, gate, gsa, run, session, targets
from bench.cases import LLAMA, QWEN, TOY, Case, DecodeCase, K, make_inputs, plan, with_sizes
from nha_kernels import floors, nha_attention
from torch.nn.attention.flex_attention import create_block_mask, create_mask

ROOT = Path(__file__).resolve().parents[2]
PEAKS = floors.Peaks(flops=790e12, bandwidth=4.3e12)  # an H200, as measured
CPU = torch.device("cpu")
TIMING = {"ms": float, "ms_min": float, "ms_p10": float, "ms_p90": float, "runs": int, "input_sets": int}


def toy(out: Path, *more: str) -> int:
    """A toy run in this process."""
    return run.main(["--toy", "--backend", "torch", "--out", str(out), *more])


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A toy run, started by path from elsewhere, as a user would."""
    folder = tmp_path_factory.mktemp("bench")
    command = [sys.executable, ROOT / "kernels/bench/run.py", "--toy", "--backend", "torch", "--out", folder / "out"]
    env = {n: v for n, v in os.environ.items() if n not in ("PYTHONPATH", "TRITON_INTERPRET")}
    env |= {"NHA_BACKEND": "torch", "NHA_COMMIT": "abc-dirty"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    names = sorted(p.suffix for p in (folder / "out").iterdir())
    assert names == [".json", ".md", ".png"], names
    (path,) = (folder / "out").glob("*.json")
    return {"json": json.loads(path.read_text()), "page": path.with_suffix(".md").read_text(), "shown": done.stdout}


def test_results_say_what_was_measured_on(results):
    r = results["json"]
    assert (r["schema"], r["toy"], r["backend"], r["dtype"]) == (run.SCHEMA, True, "torch", "float32")
    e = r["environment"]
    assert (e["commit"], e["dirty"]) == ("abc", True)
    assert e["packages"]["torch"] == torch.__version__
    assert e["command"] == "python kernels/bench/run.py --toy --backend torch --out DIR"
    assert e["date"].endswith("+00:00")
    assert r["gate"]["green"] and r["gate"]["tests"] == {"not_run": "toy run: no CUDA device"}
    assert r["peaks"]["flops_per_s"] > 0 and r["peaks"]["bytes_per_s"] > 0
    assert r["not_measured"] == []


def test_every_row_stands_beside_its_floor_and_baselines(results):
    rows = results["json"]["rows"]
    kinds = [row["kind"] for row in rows]
    assert {k: kinds.count(k) for k in set(kinds)} == {"forward": 3, "backward": 3, "forward+backward": 3, "decode": 2}
    for row in rows:
        assert {n: type(row["ours"][n]) for n in TIMING} == TIMING
        assert 0 < row["ours"]["ms_min"] <= row["ours"]["ms"] <= row["ours"]["ms_p90"]
        assert row["ratio"] == pytest.approx(row["ours"]["ms"] / row["floor"]["ms"])
        names = {"forward": 4, "forward+backward": 4, "backward": 0, "decode": 1}
        assert len(row["baselines"]) == names[row["kind"]]
        for entry in row["baselines"].values():
            if "ms" in entry:
                assert entry["speedup"] == pytest.approx(entry["ms"] / row["ours"]["ms"])
    checked = [c["check"] for c in results["json"]["gate"]["checks"]]
    assert len(checked) == len(set(checked)) == 4  # two shapes, two contexts
    assert all(e <= 1e-5 for c in results["json"]["gate"]["checks"] for e in c["errors"].values())


def test_unavailable_baselines_are_recorded_with_the_reason(results):
    row = next(r for r in results["json"]["rows"] if r["kind"] == "forward")
    assert "ms" in row["baselines"]["sdpa"]
    assert row["baselines"]["flex"] == {"not_available": "needs a CUDA device"}
    assert row["baselines"]["gsa chain"]["not_available"]
    assert "not available" in results["page"] and "| forward_floor |" in results["page"]


def test_a_toy_run_decides_no_acceptance_line(results):
    judged = results["json"]["targets"]
    assert [t["name"] for t in judged] == [line[0] for line in targets.LINES]
    assert all(t["met"] is None for t in judged)
    assert results["shown"].count("not measured") >= len(judged)


@pytest.mark.parametrize("wrong", ["forward", "gradient", "decode"])
def test_a_red_gate_writes_nothing(wrong, tmp_path, monkeypatch, capsys):
    def attention(q, k, *rest, backend, **options):
        off = backend == "torch" and wrong != "decode"
        if wrong == "gradient" and off:
            k = k.detach() + (k - k.detach()) * 1.001
        o, final = nha_attention(q, k, *rest, backend=backend, **options)
        return (o * 1.001 if wrong == "forward" and off else o), final

    def decode(*tensors, backend, **options):
        o = gate_decode(*tensors, backend=backend, **options)
        return o * 1.001 if wrong == "decode" and backend == "torch" else o

    gate_decode = gate.nha_decode
    monkeypatch.setattr(gate, "nha_attention", attention)
    monkeypatch.setattr(gate, "nha_decode", decode)
    assert toy(tmp_path / "out") == 1
    assert not list(tmp_path.rglob("*.*"))
    part = {"forward": "o is off", "gradient": "dk is off", "decode": "o0 is off"}[wrong]
    assert part in capsys.readouterr().err


def test_gate_needs_gpu_tests_that_ran(tmp_path):
    folder = tmp_path / "tests" / "kernels"
    folder.mkdir(parents=True)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: x\n")
    head = "import pytest\npytestmark = pytest.mark.gpu\n"
    (folder / "test_it.py").write_text(head + "def test_a(): pytest.skip('none')\n")
    with pytest.raises(gate.RedGate, match="no GPU test passed: 1 found, 1 skipped"):
        gate.run_gpu_tests(tmp_path, 60)
    (folder / "test_it.py").write_text(head + "def test_a(): pass\ndef test_b(): pass\n")
    assert gate.run_gpu_tests(tmp_path, 60)["passed"] == 2
    (folder / "test_it.py").write_text(head + "def test_a(): assert 0\ndef test_b(): pass\n")
    with pytest.raises(gate.RedGate, match="failed"):
        gate.run_gpu_tests(tmp_path, 60)


def test_two_runs_that_differ_are_red(monkeypatch):
    def attention(*tensors, backend, **options):
        o, final = nha_attention(*tensors, backend=backend, **options)
        return (o + 1e-7 * torch.rand_like(o) if backend == "torch" else o), final

    monkeypatch.setattr(gate, "nha_attention", attention)
    with pytest.raises(gate.RedGate, match="differs between two runs"):
        gate.check_attention(TOY, "torch", CPU, torch.float32, gradients=False)


def test_the_end_of_the_budget_is_named(tmp_path, monkeypatch):
    def late(self, case):
        raise session.OutOfTime

    monkeypatch.setattr(session.Session, "decode", late)
    assert toy(tmp_path) == 0
    (path,) = tmp_path.glob("*.json")
    r = json.loads(path.read_text())
    assert len(r["rows"]) == 9
    missing = r["not_measured"]  # both decode cases, and the GSA chain of the three others, which comes after them
    assert len(missing) == 5 and all("the time budget ended" in text for text in missing)
    assert sum("gsa chain" in text for text in missing) == 3


def test_a_measurement_is_stopped_when_the_time_is_over():
    with pytest.raises(session.OutOfTime), session.stopped_after(0.05):
        while True:
            pass


@pytest.mark.parametrize("wrong", [["--only", "forwards"], ["--budget", "5"], []])
def test_wrong_input_is_refused(wrong, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as refused:
        run.main([*(["--toy"] if wrong else []), *wrong])
    assert refused.value.code == 2
    assert ("--only" if "forwards" in wrong else "--budget" if wrong else "--toy") in capsys.readouterr().err


FLOORS = [  # window, tokens, forward compute and memory ms, backward compute and memory ms; of 2026-11 for H200 rates
    (64, 32 * K, 0.21, 0.32, 0.71, 1.40),
    (64, 128 * K, 0.83, 1.28, 2.83, 5.61),
    (512, 32 * K, 0.51, 0.32, 1.77, 1.40),
    (512, 128 * K, 2.04, 1.28, 7.09, 5.61),
    (2048, 32 * K, 1.56, 0.32, 5.43, 1.40),
    (2048, 128 * K, 6.22, 1.28, 21.7, 5.61),
]


@pytest.mark.parametrize("window,tokens,fc,fm,bc,bm", FLOORS)
def test_floors(window, tokens, fc, fm, bc, bm):
    """Against the numbers that the acceptance lines were set with; they are given to three digits."""
    shape = with_sizes(LLAMA, 64, window)
    for work, compute, memory in ((floors.forward(shape), fc, fm), (floors.backward(shape), bc, bm)):
        floor = floors.floor(work, tokens, PEAKS)
        assert floor["compute_ms"] == pytest.approx(compute, abs=0.006, rel=3e-3)
        assert floor["memory_ms"] == pytest.approx(memory, abs=0.006, rel=3e-3)
        assert floor["ms"] == max(floor["compute_ms"], floor["memory_ms"]) > floor["io_ms"]


def test_short_rows_compute_less():
    long = floors.forward(LLAMA).flops
    assert floors.forward(LLAMA, 64).flops < floors.forward(LLAMA, 2 * K).flops < long
    assert floors.forward(LLAMA, 1 << 24).flops == pytest.approx(long, rel=1e-4)


@pytest.mark.parametrize("window,megabytes", [(64, 43), (512, 102), (2048, 303)])
def test_decode_floor(window, megabytes):
    """Of 32 layers, batch 1."""
    assert 32 * floors.decode(with_sizes(LLAMA, 64, window)).bytes / 1e6 == pytest.approx(megabytes, abs=0.6)


@pytest.mark.parametrize(
    "time,window", [(512, 64), (512, 128), (512, 129), (512, 300), (512, 512), (256, 1), (384, 900)]
)
def test_sliding_window_mask_is_what_flex_attention_builds(time, window):
    got = contenders.sliding_window_mask(time, window, CPU)
    want = create_block_mask(got.mask_mod, None, None, time, time, device="cpu")
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    assert torch.equal(got.to_dense(), want.to_dense())
    dense = create_mask(got.mask_mod, None, None, time, time, device="cpu")[0, 0]
    assert dense.sum(-1).max() == min(window, time) and dense[-1, -1] and not dense[0, 1:].any()


def test_baselines_compute_what_they_stand_for():
    x = make_inputs(TOY, 2, 40, device=CPU, dtype=torch.float32, seed=0)
    sdpa = contenders.BASELINES[0]
    assert contenders.check_baseline(sdpa, TOY, x, 1e-5) is None
    q, k, v = (t.transpose(1, 2) for t in x[:3])
    half = contenders.Prepared(
        lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True), [], q
    )
    other = contenders.Baseline("x", "", lambda shape, x: half, sdpa.unavailable, (), sdpa.meaning)
    assert "off by" in contenders.check_baseline(other, TOY, x, 1e-5)


def test_the_gsa_chain_is_slots_without_window_plus_window():
    """`meaning` of the chain against the recurrence of gated slot attention, written as its paper does."""
    x = make_inputs(TOY, 1, 30, device=CPU, dtype=torch.float64, seed=1)
    chain = next(b for b in contenders.BASELINES if b.name == "gsa chain")
    far, near = (nha_attention(*x[:4], backend="torch", **o)[0] for o in chain.meaning(TOY, 30))
    k, v, decay = (t.repeat_interleave(2, 2)[0].double() for t in (x.k, x.v, x.log_decay.exp()))
    slot_k = slot_v = torch.zeros(TOY.heads, TOY.slots, TOY.head_dim, dtype=torch.float64)
    for t in range(30):
        a = decay[t][..., None]  # [H,M,1]
        slot_k, slot_v = a * slot_k + (1 - a) * k[t][:, None], a * slot_v + (1 - a) * v[t][:, None]
        score = (slot_k @ x.q[0, t].double()[..., None])[..., 0] * TOY.head_dim**-0.5
        want = (score.softmax(-1)[:, None] @ slot_v)[:, 0]
        torch.testing.assert_close(far[0, t].double(), want, rtol=0, atol=1e-6)  # log_decay is fp32
    options = {"window": TOY.window, "branch": "window", "backend": "reference"}
    torch.testing.assert_close(near, nha_attention(*x[:4], **options)[0])


def test_the_chain_is_skipped_where_its_autotuning_does_not_fit(monkeypatch):
    monkeypatch.setattr(gsa, "_compiled", {gsa._sizes(LLAMA)})
    monkeypatch.setattr(gsa, "_tuned", set())
    assert gsa.expected_seconds(QWEN) == gsa.COMPILE_SECONDS > gsa.expected_seconds(LLAMA) == gsa.TUNE_SECONDS
    options = {"backend": "torch", "device": CPU, "toy": False, "only": set(), "save": lambda: None}
    short = session.Session({}, deadline=time.monotonic() + 100, **options)
    chain = next(b for b in contenders.BASELINES if b.name == contenders.GSA)
    assert "takes about 400 s" in short._too_long(chain, QWEN) and short._too_long(chain, LLAMA) is None
    gsa.note_tuned(QWEN)
    assert short._too_long(chain, QWEN) is None
    assert gsa.Precompilation(CPU).finish(0) == "not run"


def test_only_the_chains_kernels_are_tuned_shortly(monkeypatch):
    triton = pytest.importorskip("triton")
    tuner = triton.runtime.autotuner.Autotuner
    monkeypatch.setattr(tuner, "do_bench", tuner.__dict__["do_bench"])  # restored afterwards

    def tuned(module):
        one = tuner.__new__(tuner)
        one.base_fn, one._do_bench = type("f", (), {"__module__": module}), "as it was"
        return one

    gsa.tune_shortly()
    gsa.tune_shortly()
    assert tuned("nha_kernels.forward").do_bench == "as it was"
    assert tuned("fla.ops.gla.chunk").do_bench.keywords == {"warmup": gsa.WARMUP_MS, "rep": gsa.REPEAT_MS}


def test_plan_holds_the_issue_grid_with_the_acceptance_first():
    cases = plan(False)
    assert len(cases) == len(set(cases))
    assert [c.time // K for c in cases[:4]] == [32, 2, 4, 8] and all(c.shape == LLAMA for c in cases[:4])
    assert {c.context // K for c in cases[4:8]} == {4, 32, 128, 512}
    attention = {c for c in cases if isinstance(c, Case)}
    for tokens in (32 * K, 128 * K):
        for length in (2 * K, 8 * K, 32 * K, 128 * K):
            for base in (LLAMA, QWEN):
                grid = {Case(with_sizes(base, m, w), length, tokens) for m in (32, 64, 128) for w in (64, 512, 2048)}
                assert length > tokens or grid <= attention
    assert all(c.batch * c.time == c.tokens for c in attention)
    assert any(isinstance(c, DecodeCase) and c.batch == 1 for c in cases)


def row(kind, ms, **more):
    """A made-up row of the acceptance shape."""
    shape = {"model": LLAMA.model, "slots": 64, "window": more.pop("window", 64)}
    return {"kind": kind, "shape": shape, "ours": {"ms": ms}, "baselines": {}, "tokens": 32 * K} | more


def test_acceptance_lines_go_by_the_worst_row():
    sdpa = {"sdpa": {"speedup": 20.0}, "flash": {"speedup": 16.0}, "gsa chain": {"not_available": "x"}}
    rows = [
        row("forward", 0.6, time=32 * K, ratio=1.9, baselines=sdpa),
        row("forward", 0.7, time=2 * K, ratio=2.1, baselines={"sdpa": {"speedup": 1.2}, "flash": {"speedup": 0.9}}),
        row("forward", 9.0, time=2 * K, ratio=9.0, window=512),
        row("forward+backward", 3.0, time=2 * K, ratio=1.0, baselines={"sdpa": {"speedup": 0.5}}),
        *(row("decode", 0.03 + c * 1e-6, window=512, batch=32, context=c * K, bandwidth_share=0.7) for c in (4, 512)),
    ]
    judged = {t["name"]: t for t in targets.judge(rows)}
    assert (judged["forward_floor"]["worst"], judged["forward_floor"]["met"]) == (2.1, False)
    assert (judged["sdpa_forward"]["worst"], judged["sdpa_forward"]["met"]) == (0.9, False)
    assert (judged["sdpa_forward_32k"]["worst"], judged["sdpa_forward_32k"]["met"]) == (16.0, True)
    assert judged["sdpa_training"]["met"] is None and judged["gsa_forward"]["met"] is None
    assert judged["decode_bandwidth"]["met"] and judged["decode_flat"]["met"]
    assert judged["decode_flat"]["worst"] == pytest.approx(1.0, abs=0.02)
    assert [t["met"] for t in rows[0]["targets"]] == [True, True, True]
    assert rows[2]["targets"] == rows[3]["targets"] == []
