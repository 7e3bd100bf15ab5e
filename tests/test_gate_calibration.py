"""Gates that start from text: clusters of keys are found, the layer's error falls, runs agree, the rest is refused."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from nha_kernels.gates import log_decay_from_logits, log_decay_from_routing, write_strength
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from nha_convert.convert import load_student, new_parameter_names
from nha_convert.errors import InputError
from nha_convert.gate_attended import attended_gates, coherence, routed_gates
from nha_convert.gate_calibration import GateStart, LayerInputs, calibrated, cluster_gates, k_means, output_error
from nha_convert.gate_init import METHODS
from nha_convert.gate_inputs import (
    GATES,
    calibrate_gates,
    calibration_ids,
    watch_layer,
)
from nha_convert.modeling.attention_nha import nha_layers, teacher_mode
from nha_convert.pipeline import Job
from nha_convert.recipe import Recipe
from nha_convert.settings import NHASettings
from nha_convert.settings_types import NEEDS_TEXT, START_LENGTH, START_ROWS, calibration_rows
from nha_convert.streamed import load_streamed
from nha_convert.swap import swap_checkpoint
from nha_convert.train.engine import Engine

IDS = torch.randint(0, 256, (4, 64), generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")


def started(folder: Path, method: str, *, seed: int = 0, **settings: Any) -> Any:
    nha = NHASettings(**{"window": 8, "slots": 12, "sinks": 1, "gate_init": method, **settings})
    model = load_student(folder, nha, seed=seed, length=64)
    if method in NEEDS_TEXT:
        calibrate_gates(model, nha, IDS, seed=seed)
    return model


def new_tensors(model: Any) -> dict[str, torch.Tensor]:
    parameters = dict(model.named_parameters())
    return {name: parameters[name].detach().clone() for name in new_parameter_names(model)}


def recipe_for(text: Path, **changes: Any) -> Recipe:
    settings: dict[str, Any] = {
        "model": "pico",
        "output": "unused",
        "seed": 5,
        "nha": {"slots": 8, "window": 8, "sinks": 1, "gate_init": "clusters"},
        "data": {"sources": [{"source": "text", "path": str(text)}]},
        "stages": [{"kind": "align", "tokens": 96, "sequence_length": 48, "batch_size": 2}],
        "evaluate": {"sequence_length": 48},
        "runtime": {"device": "cpu"},
    }
    return Recipe.model_validate(settings | changes)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text(" ".join(f"word{(7 * i * i) % 101}" for i in range(1500)))
    return path


# ---- clusters ---------------------------------------------------------------------------------------
def planted(clusters: int = 6, each: int = 80) -> tuple[torch.Tensor, ...]:
    """Hidden states [n, 24], keys [n, 1, 8] in well separated clusters, W_k [8, 24], each token's cluster [n]."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(8, 24, generator=generator) / 24**0.5
    places = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q[:clusters] * 6
    truth = torch.arange(clusters).repeat_interleave(each)[torch.randperm(clusters * each, generator=generator)]
    keys = places[truth] + 0.3 * torch.randn(len(truth), 8, generator=generator)
    hidden = keys @ torch.linalg.pinv(weight).T
    return hidden, keys[:, None], weight, truth


def test_k_means_finds_planted_clusters() -> None:
    _, keys, _, truth = planted()
    centroids, labels = k_means(keys[:, 0], 6, seed=0)
    pairs = {(int(label), int(place)) for label, place in zip(labels, truth)}
    assert len(pairs) == 6 and {place for _, place in pairs} == set(range(6))
    assert torch.allclose(centroids[labels[0]], keys[truth == truth[0], 0].mean(0), atol=1e-5)
    again, _ = k_means(keys[:, 0], 6, seed=0)
    assert torch.equal(centroids, again)
    same, _ = k_means(torch.ones(9, 3), 4, seed=0)  # fewer places than clusters
    assert torch.equal(same, torch.ones(4, 3))
    with pytest.raises(ValueError, match="7 clusters need at least as many points, found 5"):
        k_means(torch.ones(5, 3), 7, seed=0)


@pytest.mark.parametrize("tau", [2.0, 8.0])
def test_slots_write_their_own_cluster_and_keep_otherwise(tau: float) -> None:
    hidden, keys, key_weight, truth = planted()
    weight, bias = cluster_gates(hidden, keys, key_weight, slots=6, tau=tau, horizons=(16.0, 256.0), seed=0)
    strength = write_strength(log_decay_from_logits(hidden @ weight.T + bias, tau))  # [n,M]
    written = torch.stack([strength[truth == place].mean(0) for place in range(6)])  # [cluster,M]
    own = written.argmax(0)
    assert sorted(own.tolist()) == list(range(6)), "each slot has a cluster of its own"
    largest = written.max(0).values
    others = (written.sum(0) - largest) / 5
    assert (largest > 0.15).all() and (largest > 3 * others).all()
    assert others[-1] < others[0], "the last slot keeps longer than the first"


# ---- what attention comes back to -------------------------------------------------------------------
@pytest.mark.parametrize("tau", [2.0, 8.0])
def test_slots_write_what_is_asked_for_and_nothing_else(tau: float) -> None:
    """Half of the tokens are never asked for, which a channel of the hidden states tells; keys do not."""
    hidden, keys, _, truth = planted(each=160)
    wanted = torch.arange(len(truth)) % 2 == 0
    hidden = torch.cat([hidden, wanted[:, None] * 2.0], 1)
    received = torch.where(wanted, 1.0, 0.0)[:, None]
    weight, bias = attended_gates(hidden, keys, received, slots=6, tau=tau, seed=0)
    strength = write_strength(log_decay_from_logits(hidden @ weight.T + bias, tau))  # [n,M]
    written = torch.stack([strength[wanted & (truth == place)].mean(0) for place in range(6)])  # [cluster,M]
    assert sorted(written.argmax(0).tolist()) == list(range(6)), "each slot has a cluster of its own"
    largest = written.max(0).values
    assert (largest > 0.7).all()
    assert ((written.sum(0) - largest) / 5 < 0.02).all(), "other clusters leave it alone"
    assert (strength[~wanted].mean(0) < 0.02).all(), "and so do tokens of its own that nothing asks for"


def test_routed_gates_write_once() -> None:
    """As above: what is asked for goes whole into the slot of its cluster, all else nowhere."""
    hidden, keys, _, truth = planted(each=160)
    wanted = torch.arange(len(truth)) % 2 == 0
    hidden = torch.cat([hidden, wanted[:, None] * 2.0], 1)
    received = torch.where(wanted, 1.0, 0.0)[:, None]
    weight, bias, write_weight, write_bias = routed_gates(hidden, keys, received, slots=6, seed=0)
    decay = log_decay_from_routing(hidden @ write_weight.T + write_bias, (hidden @ weight.T + bias)[:, None])[:, 0]
    strength = write_strength(decay)  # [n,M]
    written = torch.stack([strength[wanted & (truth == place)].mean(0) for place in range(6)])  # [cluster,M]
    assert sorted(written.argmax(0).tolist()) == list(range(6)), "each slot has a cluster of its own"
    assert (written.max(0).values > 0.9).all() and (written.sum(1) <= 1).all()
    assert (strength[~wanted].sum(1) < 0.05).all()


def test_where_nothing_is_asked_for_gates_keep() -> None:
    hidden, keys, _, _ = planted()
    weight, bias = attended_gates(hidden, keys, torch.zeros(len(hidden), 1), slots=6, tau=2.0, seed=0)
    assert weight.isfinite().all() and write_strength(log_decay_from_logits(hidden @ weight.T + bias, 2.0)).max() < 0.05
    *_, write_weight, write_bias = routed_gates(hidden, keys, torch.zeros(len(hidden), 1), slots=6, seed=0)
    assert torch.sigmoid(hidden @ write_weight.T + write_bias).max() < 0.05


def test_coherence_is_the_mean_of_cos_over_distances() -> None:
    frequency = torch.tensor([1.0, 0.1, 0.001])
    cos = (torch.arange(50)[:, None] * frequency).cos().repeat(1, 2)  # [T,P]
    distances = torch.zeros(3, 50)
    distances[0, 10], distances[0, 30] = 3.0, 1.0
    distances[1, 31] = 2.0  # cos(31 * 0.1) < 0
    found = coherence(distances, cos, head_dim=8)
    assert found.shape == (3, 8)
    torch.testing.assert_close(found[0, 1], 0.75 * torch.tensor(1.0).cos() + 0.25 * torch.tensor(3.0).cos())
    assert torch.equal(found[:, :3], found[:, 3:6]) and torch.equal(found[:, 6:], torch.ones(3, 2))
    assert found[1, 1] == 0 and found[0, 2] > 0.999
    assert torch.equal(found[2], torch.ones(8)), "a head that looks nowhere keeps its queries"
    torch.testing.assert_close(coherence(distances, 2 * cos, head_dim=8)[0, :3], 4 * found[0, :3])


# ---- every method -----------------------------------------------------------------------------------
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_gates_are_finite_and_deterministic(pico_models: dict[str, Path], name: str, method: str) -> None:
    first, again = (new_tensors(started(pico_models[name], method, seed=3)) for _ in range(2))
    assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)
    assert all(tensor.isfinite().all() and tensor.dtype == torch.float32 for tensor in first.values())
    plain = new_tensors(started(pico_models[name], "zero"))
    assert {key: tensor.shape for key, tensor in first.items()} == {k: t.shape for k, t in plain.items()}
    if method in NEEDS_TEXT:
        other = new_tensors(started(pico_models[name], "horizons", seed=3))
        assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_routed_gates_start_from_text(pico_models: dict[str, Path], name: str, rotary: bool) -> None:
    first, again = (
        new_tensors(started(pico_models[name], "attended", seed=3, gate="routed", slot_rotary=rotary)) for _ in range(2)
    )
    assert all(torch.equal(first[key], again[key]) and first[key].isfinite().all() for key in first)
    written = {key: tensor for key, tensor in first.items() if ".write_proj." in key}
    assert len(written) == 2 * 2 and all(tensor.any() and tensor.shape[0] == 2 for tensor in written.values())
    apart = new_tensors(started(pico_models[name], "attended", seed=3, gate="routed", slot_rotary=not rotary))
    assert any(not torch.equal(first[key], apart[key]) for key in first)


def test_full_layers_keep_their_start(pico_llama: Path) -> None:
    model = started(pico_llama, "clusters", window=[8, "full"])
    plain = started(pico_llama, "horizons", window=[8, "full"])
    for (_, one), (_, other), same in zip(nha_layers(model), nha_layers(plain), (False, True)):
        assert torch.equal(one.nha.gate_proj.weight, other.nha.gate_proj.weight) == same


# ---- calibration ------------------------------------------------------------------------------------
@torch.no_grad()
def seen(model: Any) -> dict[int, LayerInputs]:
    found: dict[int, LayerInputs] = {}
    with teacher_mode(model), ExitStack() as hooks:
        for index, layer in nha_layers(model):
            watch_layer(layer, hooks, lambda inputs, index=index: found.__setitem__(index, inputs))
        model(input_ids=IDS)
    return found


def plain_start(layer: Any) -> GateStart:
    gate = layer.nha
    write = () if gate.write_proj is None else (gate.write_proj.weight, gate.write_proj.bias)
    return GateStart(gate.gate_proj.weight, gate.gate_proj.bias, gate.slot_q_scale, gate.slot_bias, *write)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "qwen3", "llama_tied_rope"])
def test_calibration_lowers_every_layers_error(pico_models: dict[str, Path], name: str) -> None:
    model = started(pico_models[name], "horizons")
    inputs = seen(model)
    for index, layer in nha_layers(model):
        before = output_error(inputs[index], plain_start(layer))
        start = calibrated(inputs[index], plain_start(layer), with_query_scale=True, with_slot_bias=True)
        assert output_error(inputs[index], start) < 0.98 * before
        alone = calibrated(inputs[index], plain_start(layer), with_query_scale=False, with_slot_bias=False)
        assert torch.equal(alone.slot_q_scale, torch.ones_like(layer.nha.slot_q_scale)) and not alone.slot_bias.any()


@torch.no_grad()
def test_calibration_moves_routed_gates(pico_llama: Path) -> None:
    """From gates that write everything everywhere, which routed gates are before they are started."""
    model = load_student(pico_llama, NHASettings(window=8, slots=12, sinks=1, gate="routed", slot_rotary=True))
    inputs = seen(model)
    for index, layer in nha_layers(model):
        plain = plain_start(layer)
        start = calibrated(inputs[index], plain, with_query_scale=True, with_slot_bias=True)
        assert output_error(inputs[index], start) < 0.98 * output_error(inputs[index], plain)
        assert start.write_bias is not None and start.write_bias.any(), "the strength is shifted"


@torch.no_grad()
@pytest.mark.parametrize("settings", [{"method": "horizons"}, {"method": "attended", "gate": "routed"}])
@pytest.mark.parametrize("rotary", [False, True])
def test_the_error_is_the_layers_own(pico_llama: Path, settings: dict[str, Any], rotary: bool) -> None:
    """`output_error` from tensors is what the module itself gives."""
    model = started(pico_llama, **settings, slot_rotary=rotary)
    inputs = seen(model)
    found: dict[int, torch.Tensor] = {}
    with ExitStack() as hooks:
        for index, layer in nha_layers(model)[:1]:
            keep = layer.register_forward_hook(lambda m, a, out, index=index: found.__setitem__(index, out[0]))
            hooks.callback(keep.remove)
        model(input_ids=IDS)
        student = found[0]
        with teacher_mode(model):
            model(input_ids=IDS)
    error = (student - found[0]).square().sum() / found[0].square().sum()
    assert output_error(inputs[0], plain_start(nha_layers(model)[0][1])) == pytest.approx(error.item(), rel=1e-4)


# ---- runs -------------------------------------------------------------------------------------------
def job(recipe: Recipe, out: Path, teacher: Path) -> Job:
    made = Job(recipe, out, teacher, Engine(), CPU, True)
    made.tokenizer = AutoTokenizer.from_pretrained(teacher)
    out.mkdir(exist_ok=True)
    return made


def test_a_run_keeps_its_gates(pico_llama: Path, text: Path, tmp_path: Path) -> None:
    recipe = recipe_for(text)
    first = new_tensors(job(recipe, tmp_path / "one", pico_llama)._student())
    elsewhere = new_tensors(job(recipe, tmp_path / "two", pico_llama)._student())
    assert all(torch.equal(first[name], elsewhere[name]) for name in first), "a function of seed, text and settings"
    stamp = (tmp_path / "one" / GATES).stat().st_mtime_ns
    resumed = new_tensors(job(recipe, tmp_path / "one", pico_llama)._student())
    assert all(torch.equal(first[name], resumed[name]) for name in first)
    assert (tmp_path / "one" / GATES).stat().st_mtime_ns == stamp
    other = new_tensors(job(recipe_for(text, seed=6), tmp_path / "three", pico_llama)._student())
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_calibration_text(text: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    recipe = recipe_for(text)
    ids = calibration_ids(recipe, tokenizer)
    assert ids.shape == (START_ROWS, 48) and torch.equal(ids, calibration_ids(recipe, tokenizer))
    assert calibration_ids(recipe_for(text, stages=[]), tokenizer).shape == (START_ROWS, 48)
    more = recipe_for(text, nha={**recipe.nha.model_dump(), "gate_init_rows": START_ROWS + 3})
    assert torch.equal(calibration_ids(more, tokenizer)[:START_ROWS], ids)
    assert len(calibration_ids(more, tokenizer)) == START_ROWS + 3
    assert [calibration_rows(length, 64) for length in (48, 1024, 2048, 10**6)] == [64, 64, 32, 1]
    with pytest.raises(ValueError, match="gate_init_rows is 64, but nha.gate_init spread reads no text; set it to cl"):
        recipe_for(text, nha={"gate_init": "spread", "gate_init_rows": 64})
    long = recipe_for(
        text, stages=[{"kind": "align", "tokens": 96, "sequence_length": START_ROWS * START_LENGTH // 4 + 1}]
    )
    assert long.training_length is not None and len(calibration_ids(long, tokenizer)) == 3
    packed = recipe_for(text, data={**recipe.data.model_dump(), "packing": "documents"})
    assert torch.equal(ids, calibration_ids(packed, tokenizer))


# ---- refusals ---------------------------------------------------------------------------------------
def test_routed_gates_are_refused_where_no_model_runs(pico_llama: Path, text: Path, tmp_path: Path) -> None:
    nha = NHASettings(window=8, slots=8, gate="routed")
    assert nha.gate_init == "attended"
    with pytest.raises(InputError, match="gate is routed.*Set it to independent, with nha.gate_init one of key"):
        swap_checkpoint(pico_llama, tmp_path / "out", nha, quiet=True)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="gate is routed, .* found gate_init spread; set gate_init to attended"):
        NHASettings(gate="routed", gate_init="spread")
    with pytest.raises(ValueError, match="gate_horizons is not read by routed gates; remove it"):
        NHASettings(gate="routed", gate_horizons=[8, 100])
    with pytest.raises(ValueError, match="set nha.gate to independent and nha.gate_init to horizons"):
        recipe_for(text, nha={"gate": "routed"}, runtime={"device": "cpu", "layers_at_once": 1})


@pytest.mark.parametrize("method", NEEDS_TEXT)
def test_where_no_model_runs(pico_llama: Path, text: Path, tmp_path: Path, method: str) -> None:
    nha = NHASettings(window=8, slots=8, gate_init=method)
    with pytest.raises(InputError, match=f"nha.gate_init is {method}.*one of key, spread, zero, horizons"):
        swap_checkpoint(pico_llama, tmp_path / "out", nha, quiet=True)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=f"nha.gate_init is {method}"):
        load_streamed(pico_llama, nha, dtype=torch.float32, device=CPU, scratch=tmp_path / "scratch")
    with pytest.raises(ValueError, match="remove runtime.layers_at_once"):
        recipe_for(text, nha=nha.model_dump(), runtime={"device": "cpu", "layers_at_once": 1})


def test_what_calibration_refuses(pico_llama: Path) -> None:
    model = started(pico_llama, "horizons")
    with pytest.raises(ValueError, match="only clusters, calibrated, attended"):
        calibrate_gates(model, NHASettings(gate_init="key"), IDS, seed=0)
    with pytest.raises(InputError, match="looks at 6 tokens behind the sinks, fewer than nha.slots = 12"):
        calibrate_gates(model, NHASettings(slots=12, gate_init="clusters"), IDS[:1, :10], seed=0)


def test_swap_on_disk_takes_horizons(pico_llama: Path, tmp_path: Path) -> None:
    nha = NHASettings(window=8, slots=8, gate_init="horizons", gate_horizons=[4, 64])
    swap_checkpoint(pico_llama, tmp_path / "out", nha, quiet=True)
    stored = new_tensors(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    made = new_tensors(load_student(pico_llama, nha))
    assert stored.keys() == made.keys() and all(torch.equal(stored[name], made[name]) for name in made)
