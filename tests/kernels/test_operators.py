"""What PyTorch needs of the operators: schemas, fake tensors, compile, autocast, checkpointing; and what they cost."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from costs import counted_launches, saved_bytes_per_token
from nha_kernels import NHAState, backends, log_decay_from_logits, nha_attention, nha_decode
from nha_kernels.library import decode, tile_attention
from nha_kernels.library_chunked import chunked_attention
from op_cases import attend, case, cut
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("these tests run in Triton's interpreter", allow_module_level=True)

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")


def small(time: int = 18, **options) -> dict[str, torch.Tensor]:
    """fp32 inputs with log_decay in place of logits."""
    x = {n: y.float() for n, y in case(time, batch=1, groups=1, **options).items()}
    return x | {"log_decay": log_decay_from_logits(x.pop("logits"), 8.0)}


def tile_arguments(x: dict[str, torch.Tensor], window: int, sinks: int) -> tuple:
    """Arguments of the Triton operator for one row."""
    names = ("q", "k", "v", "log_decay", "cos", "sin")
    flat = [x[n].flatten(0, 1).contiguous().requires_grad_(n not in ("cos", "sin")) for n in names]
    learned = [x[n].requires_grad_() for n in ("slot_q_scale", "slot_bias")]
    return (*flat, *learned, None, None, None, None, 1, window, sinks, 0, 0.25, True, "both", True)


def test_opcheck_triton():
    torch.library.opcheck(tile_attention, tile_arguments(small(), 4, 1), test_utils=CHECKS)


def test_opcheck_chunked():
    x = {n: y.requires_grad_(n not in ("cos", "sin")) for n, y in small().items()}
    names = ("q", "k", "v", "log_decay", "slot_q_scale", "slot_bias")
    arguments = (*(x[n] for n in names), [], x["cos"], x["sin"], None, None, 4, 1, 0.25, True, "both", True)
    torch.library.opcheck(chunked_attention, arguments, test_utils=CHECKS)


def test_opcheck_decode():
    x = small(1)
    state = NHAState.new(1, 1, 8, 16, window=4, sinks=1, rotary_dim=16)
    names = ("cos", "sin", "slot_q_scale", "slot_bias")
    first = [x[n] for n in ("q", "k", "v", "log_decay")]
    arguments = (*first, list(state.tensors().values()), *(x[n] for n in names), None, 4, 1, 0.25, True, "both")
    for backend in ("torch", "triton"):
        torch.library.opcheck(decode, (*arguments, backend), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_a_graph_break(backend, compiler):
    """Forward, gradients and a step from the state, compiled as whole graphs, equal the same without compilation."""
    x = small(20)
    gates = x.pop("log_decay")

    def loss(q, k, v, log_decay):
        o, state = nha_attention(
            q, k, v, log_decay, window=4, sinks=1, backend=backend, output_final_state=True, **options
        )
        return o.square().sum() + state.slot_k.sum(), state

    options = {n: x[n] for n in ("cos", "sin", "slot_q_scale", "slot_bias")}
    results = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend=compiler)):
        leaves = [y.detach().clone().requires_grad_() for y in (x["q"], x["k"], x["v"], gates)]
        value, state = run(*leaves)
        value.backward()
        results.append([value.detach(), state.slot_v.detach(), *(y.grad for y in leaves)])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_decode_compiles_and_updates_the_state(backend):
    x = case(12, batch=1, groups=1, dtype=torch.float32)
    x = {n: y.float() for n, y in x.items()}
    _, state = attend(cut(x, slice(0, 11)), window=4, sinks=1, output_final_state=True, backend="torch")
    last = cut(x, slice(11, 12))
    log_decay = log_decay_from_logits(last.pop("logits"), 8.0)
    other = state.clone()

    def step(q, k, v, log_decay, state):
        return nha_decode(q, k, v, log_decay, state, backend=backend, cos=last["cos"], sin=last["sin"])

    arguments = (last["q"], last["k"], last["v"], log_decay)
    with torch.no_grad():
        want = step(*arguments, state)
        got = torch.compile(step, fullgraph=True, backend="aot_eager")(*arguments, other)
    torch.testing.assert_close(got, want)
    for name, y in state.tensors().items():
        torch.testing.assert_close(other.tensors()[name], y)


def test_compiled_decode_updates_a_state_that_is_not_contiguous():
    x = small(3)
    _, state = nha_attention(**cut(x, slice(0, 2)), window=4, sinks=1, output_final_state=True, backend="torch")
    strided = {n: torch.stack([y, y], -1)[..., 0] for n, y in state.tensors().items()}
    other = state.with_tensors(strided)
    assert not other.ring_k.is_contiguous()
    last = cut(x, slice(2, 3))
    step = torch.compile(nha_decode, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        want = nha_decode(**last, state=state, backend="triton")
        torch.testing.assert_close(step(**last, state=other, backend="triton"), want)
    for name, y in state.tensors().items():
        torch.testing.assert_close(strided[name], y)


def test_autocast_keeps_the_inputs_dtypes():
    x = small()
    x = {n: y.bfloat16() if n in "qkv" else y for n, y in x.items()}
    outside, _ = nha_attention(**x, window=4, backend="triton")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, _ = nha_attention(**x, window=4, backend="triton")
    assert inside.dtype == torch.bfloat16
    assert torch.equal(inside, outside)


def test_checkpointing_gives_the_same_gradient():
    x = small()
    grads = []
    for wrap in (lambda f, *a: f(*a), lambda f, *a: checkpoint(f, *a, use_reentrant=False)):
        q = x["q"].detach().clone().requires_grad_()
        rest = {n: y for n, y in x.items() if n != "q"}
        wrap(lambda q, rest=rest: nha_attention(q, **rest, window=4, backend="triton")[0], q).sum().backward()
        grads.append(q.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("options", [{"window": 0}, {"window": 4, "sinks": 2}])
def test_launches(options):
    """Forward 2, backward 5, decode at most 2, with every learnable on."""
    x = {n: y.requires_grad_(n not in ("cos", "sin")) for n, y in small().items()}
    with counted_launches() as forward:
        o, state = nha_attention(**x, backend="triton", output_final_state=True, **options)
    assert forward == ["tile_states", "attend"]
    with counted_launches() as backward:
        o.sum().backward()
    assert backward == ["tile_states", "query_side", "reverse_scan", "key_side", "gate_side"]
    last = {n: y.detach() if n.startswith("slot") else y[:, -1:].detach() for n, y in x.items()}
    with counted_launches() as decoding:
        nha_decode(**last, state=state.detach().clone(), backend="triton")
    assert 1 <= len(decoding) <= 2


def test_saved_for_backward():
    """q, k, v, o, log decay and lse, nothing else: 24 KB per token and layer at Llama-3-8B's attention."""
    assert saved_bytes_per_token() <= 24_000


def test_backends(monkeypatch):
    x = {n: y.float() for n, y in case(9).items()}
    assert torch.equal(attend(x, window=2)[0], attend(x, window=2, backend="torch")[0])  # auto on a CPU
    narrow = {n: y.float() for n, y in case(9, dim=8, rotary=8).items()}
    with pytest.raises(RuntimeError, match="'triton' cannot run this: its head_dim is 8"):
        attend(narrow, window=2, backend="triton")
    with pytest.raises(RuntimeError, match="dtype is torch.float64"):
        attend(case(9), window=2, backend="triton")
    state = NHAState.new(2, 2, 8, 16, window=2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="state's slots are torch.float64"):
        y = {n: x[n][:, :1] for n in "qkv"}
        nha_decode(**y, log_decay=torch.zeros(2, 1, 2, 8), state=state, backend="triton")
    monkeypatch.setenv("NHA_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="head_dim is 8"):
        attend(narrow, window=2)


def test_falls_back_with_one_warning(monkeypatch):
    """`auto` on a GPU whose call the kernels cannot take; here the device is only said to be one."""
    monkeypatch.delenv("NHA_BACKEND", raising=False)
    backends._warn_once.cache_clear()

    class OnGpu:
        device, dtype, shape = torch.device("cuda"), torch.float64, (1, 9, 4, 16)

    log_decay = torch.zeros(1, 9, 2, 8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        names = [backends.choose_backend("auto", OnGpu(), log_decay) for _ in range(3)]  # type: ignore[arg-type]
    assert names == ["torch"] * 3
    assert [str(w.message) for w in caught] == [
        "NHA runs in PyTorch, not in Triton: its dtype is torch.float64, allowed are fp32, bf16 and fp16"
    ]


def test_without_triton():
    """The package imports, runs and says what is missing on a machine that has no triton."""
    code = """
import sys
sys.modules["triton"] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "triton" else find(name, *a)
import torch
from nha_kernels import nha_attention
q, z = torch.randn(1, 9, 2, 16), torch.full((1, 9, 2, 8), -0.1)
assert torch.isfinite(nha_attention(q, q, q, z, window=3)[0]).all()
try:
    nha_attention(q, q, q, z, window=3, backend="triton")
except RuntimeError as error:
    print(error)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "triton is not installed (pip install triton)" in out.stdout


def test_two_copies_in_one_process(tmp_path):
    """Code that travelled with two checkpoints registers the same operators beside the package's own."""
    package = Path(backends.__file__).parent
    for name in ("copy_one", "copy_two"):
        shutil.copytree(package, tmp_path / name)
    code = """
import torch, copy_one.ops, nha_kernels, copy_two.ops
q, z = torch.randn(1, 9, 2, 16, requires_grad=True), torch.full((1, 9, 2, 8), -0.1)
for module in (nha_kernels, copy_one.ops, copy_two.ops, nha_kernels):
    o, _ = module.nha_attention(q, q, q, z, window=3, backend="triton")
    o.sum().backward()
    print(torch.isfinite(q.grad).all().item())
"""
    paths = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(package.parent)])}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | paths)
    assert out.stdout.split() == ["True"] * 4, out.stderr
