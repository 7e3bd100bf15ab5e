"""What a student is: its parameters, gradients, branches, precision, files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from nha_convert.convert import load_student, new_parameter_names
from nha_convert.modeling import NHALlamaConfig, NHALlamaForCausalLM
from nha_convert.modeling.attention_nha import branch_mode, nha_layers, teacher_mode
from nha_convert.settings import NHASettings

IDS = torch.arange(2 * 40).view(2, 40) * 7 % 251
SMALL = NHASettings(window=6, slots=8, sinks=2)


@pytest.mark.parametrize("slots", [5, 32])
def test_gradients_reach_every_parameter(pico: Path, slots: int) -> None:
    model = load_student(pico, NHASettings(window=6, slots=slots, sinks=2)).train()
    assert model.config.nha_slots == slots
    model(IDS, labels=IDS).loss.backward()
    new = new_parameter_names(model)
    assert len(new) == 2 * 4
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_gradient_checkpointing_changes_nothing(pico_llama: Path) -> None:
    model = load_student(pico_llama, SMALL).train()
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("options", [{"slot_query_scale": False}, {"slot_bias": False}])
def test_learnables_can_be_left_out(pico_llama: Path, options: dict[str, Any]) -> None:
    model = load_student(pico_llama, NHASettings(window=6, slots=8, **options))
    gone = {"slot_query_scale": "slot_q_scale", "slot_bias": "slot_bias"}[next(iter(options))]
    assert len(new_parameter_names(model)) == 2 * 3
    assert not any(gone in name for name in new_parameter_names(model))
    with torch.no_grad():  # at their start the learnables change nothing
        assert torch.equal(model(IDS).logits, load_student(pico_llama, NHASettings(window=6, slots=8))(IDS).logits)


@torch.no_grad()
def test_save_and_load(pico: Path, tmp_path: Path) -> None:
    model = load_student(pico, NHASettings(window=[6, "full"], slots=8, sinks=2, gate_init="key"))
    model.save_pretrained(tmp_path)
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert type(again) is type(model) and again.config.nha_windows == [6, None]
    assert "auto_map" not in (tmp_path / "config.json").read_text()
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    base, saved = load_file(pico / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert set(saved) - set(base) == new_parameter_names(model)
    assert all(torch.equal(saved[name], tensor) for name, tensor in base.items())


ROUTED = NHASettings(window=6, slots=8, sinks=2, gate="routed", slot_rotary=True)


def test_routed_gates_learn(pico: Path) -> None:
    model = load_student(pico, ROUTED).train()
    model(IDS, labels=IDS).loss.backward()
    new = {name: parameter for name, parameter in model.named_parameters() if name in new_parameter_names(model)}
    assert len(new) == 2 * 6
    for name, parameter in new.items():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name


@torch.no_grad()
def test_a_routed_model_is_saved_and_loaded(pico: Path, tmp_path: Path) -> None:
    model = load_student(pico, ROUTED, dtype=torch.bfloat16)
    for _, layer in nha_layers(model):
        layer.nha.write_proj.bias.fill_(1.5)
    model.save_pretrained(tmp_path)
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert again.config.nha_gate == "routed" and again.config.nha_slot_rotary
    assert all(layer.nha.write_proj.weight.dtype == torch.float32 for _, layer in nha_layers(again))
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@torch.no_grad()
def test_bfloat16_keeps_the_gates_in_fp32(pico_llama: Path) -> None:
    model = load_student(pico_llama, SMALL, dtype=torch.bfloat16)
    new = new_parameter_names(model)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name in new else torch.bfloat16), name
    exact = load_student(pico_llama, SMALL)(IDS).logits
    assert (model(IDS).logits - exact).abs().max() < 0.1 * exact.abs().max()  # bf16 has 8 bits
    log_decay, _, _ = nha_layers(model.to(torch.bfloat16))[0][1].nha(torch.randn(1, 3, 64).bfloat16())
    assert log_decay.dtype == torch.float32 and log_decay.shape == (1, 3, 2, 8)


@torch.no_grad()
def test_branches(pico_llama: Path) -> None:
    model = load_student(pico_llama, SMALL)
    seen = {}
    for branch in ("both", "window", "slots", "none"):
        with branch_mode(model, branch):
            seen[branch] = model(IDS).logits
    assert torch.equal(model(IDS).logits, seen["both"])
    assert torch.allclose(seen["window"][:, :6], seen["both"][:, :6], atol=1e-5)  # nothing is absorbed yet
    for a, b in (("both", "window"), ("both", "slots"), ("window", "none"), ("slots", "none")):
        assert not torch.allclose(seen[a][:, 20:], seen[b][:, 20:], atol=1e-2), (a, b)
    changed = IDS.clone()
    changed[:, :-1] += 1
    with branch_mode(model, "none"):  # without attention a token sees only itself
        assert torch.equal(model(changed).logits[:, -1], seen["none"][:, -1])
    with pytest.raises(ValueError, match="window"), branch_mode(model, "slot"):
        pass


@torch.no_grad()
def test_packed_documents_are_separate(pico: Path) -> None:
    model = load_student(pico, NHASettings(window=[6, "full"], slots=8, sinks=2))
    lengths = [17, 1, 22]
    packed, positions = IDS[:1], torch.cat([torch.arange(n) for n in lengths])[None]
    together = model(packed, position_ids=positions, use_cache=False).logits
    alone = torch.cat([model(piece).logits for piece in packed.split(lengths, dim=1)], 1)
    assert (together - alone).abs().max() <= 1e-5
    boundaries = torch.tensor([0, 17, 18, 40], dtype=torch.int32)
    only_nha = load_student(pico, NHASettings(window=6, slots=8, sinks=2))
    by_position = only_nha(packed, position_ids=positions, use_cache=False).logits
    assert torch.equal(
        only_nha(packed, position_ids=positions, cu_seq_lens_q=boundaries, use_cache=False).logits, by_position
    )
    with pytest.raises(ValueError, match="cache"):
        model(packed, position_ids=positions, cu_seq_lens_q=boundaries, use_cache=True)
    with pytest.raises(ValueError, match="batch of 2 rows"):
        model(IDS, cu_seq_lens_q=boundaries, use_cache=False)


@torch.no_grad()
@pytest.mark.parametrize(("windows", "rotary"), [(6, False), ([6, "full"], False), (6, True)])
def test_packed_rows_of_a_batch(pico: Path, windows: Any, rotary: bool) -> None:
    """Rows may be packed differently; each document is what it is alone."""
    model = load_student(pico, NHASettings(window=windows, slots=8, sinks=2, slot_rotary=rotary))
    lengths = ([17, 1, 22], [40])
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    together = model(IDS, position_ids=positions).logits
    for row, cuts in enumerate(lengths):
        alone = torch.cat([model(piece).logits for piece in IDS[row : row + 1].split(cuts, dim=1)], 1)
        assert (together[row] - alone[0]).abs().max() <= 1e-5
    equal = model(IDS, position_ids=positions[:1]).logits  # one row of positions for the whole batch
    assert torch.equal(equal, model(IDS, position_ids=positions[:1].expand(2, -1)).logits)


@torch.no_grad()
def test_packed_documents_need_no_further_options(pico_llama: Path) -> None:
    """In evaluation mode the default cache is left off, and boundaries alone separate full layers too."""
    model = load_student(pico_llama, NHASettings(window=4, slots=8, full_attention_layers=[0]))
    first, second = torch.arange(9)[None] * 5 % 251, torch.arange(11)[None] * 7 % 251
    packed = torch.cat((first, second), 1)
    positions = torch.cat((torch.arange(9), torch.arange(11)))[None]
    boundaries = torch.tensor([0, 9, 20], dtype=torch.int32)
    alone = model(second).logits
    for options in ({"position_ids": positions}, {"cu_seq_lens_q": boundaries}):
        assert (model(packed, **options).logits[:, 9:] - alone).abs().max() <= 1e-5


def test_outputs_of_the_base_class(pico_llama: Path) -> None:
    out = load_student(pico_llama, SMALL)(IDS, output_hidden_states=True)
    assert len(out.hidden_states) == 3 and out.past_key_values.get_seq_length() == 40


@torch.no_grad()
def test_slots_remember_what_left_the_window(pico_llama: Path) -> None:
    """The last token of a one-layer-deep look back: beyond window and sinks only the slots can carry a change."""
    model = load_student(pico_llama, NHASettings(window=4, slots=8, sinks=0))
    changed = IDS.clone()
    changed[:, 3] += 1
    assert not torch.allclose(model(IDS).logits[:, -1], model(changed).logits[:, -1], atol=1e-6)
    with branch_mode(model, "window"):
        assert torch.allclose(model(IDS).logits[:, -1], model(changed).logits[:, -1], atol=1e-6)


def test_student_hook_inside_teacher_mode(pico_llama: Path) -> None:
    """Alignment runs a layer in student mode on what the teacher gave it, padding included."""
    model = load_student(pico_llama, SMALL)
    caught: list[tuple[torch.Tensor, torch.Tensor]] = []

    def hook(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if module.nha_mode == "teacher":
            module.nha_mode = "student"
            caught.append((output[0], module(**kwargs)[0]))
            module.nha_mode = "teacher"

    for _, layer in nha_layers(model):
        layer.register_forward_hook(hook, with_kwargs=True)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :7] = 0
    with teacher_mode(model):
        model(IDS, attention_mask=mask, use_cache=False)
    assert len(caught) == 2
    teacher, student = caught[0]
    assert torch.allclose(teacher[0, 7:13], student[0, 7:13], atol=1e-5)  # within the window both see everything
    assert not torch.allclose(teacher[0, 20:], student[0, 20:], atol=1e-2)


def test_peft_wrapped(pico: Path) -> None:
    """LoRA on the projections: layers are found, teacher mode without adapters is the teacher, gradients arrive."""
    teacher = AutoModelForCausalLM.from_pretrained(pico)
    lora = LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], modules_to_save=["nha"])
    model = get_peft_model(load_student(pico, SMALL), lora)
    assert [index for index, _ in nha_layers(model)] == [0, 1]
    model(input_ids=IDS, labels=IDS).loss.backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sum(".nha." in name for name in trained) == 2 * 4 and sum("lora_B" in name for name in trained) == 2 * 4
    assert all(parameter.grad.abs().max() > 0 for name, parameter in trained.items() if "lora_A" not in name)
    with torch.no_grad():
        for name, parameter in trained.items():
            if "lora_B" in name:
                parameter.normal_()
        with teacher_mode(model), model.disable_adapter():
            assert torch.equal(model(input_ids=IDS).logits, teacher(IDS).logits)
        adapted = model(input_ids=IDS).logits
        merged = model.merge_and_unload()(IDS).logits
    assert (adapted - merged).abs().max() <= 1e-3 * adapted.abs().max()  # W + BA is rounded once more in fp32


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"nha_windows": [4]}, "1 entries"),
        ({"nha_windows": [4, -1]}, r"nha_windows\[1\] is -1"),
        ({"nha_windows": [4, True]}, "True"),
        ({"nha_slots": 0}, "nha_slots"),
        ({"nha_sinks": -1}, "nha_sinks"),
        ({"nha_tau": 0.0}, "nha_tau"),
        ({"nha_gate": "shared"}, "nha_gate is 'shared': it must be one of independent, routed"),
    ],
)
def test_configuration_refuses(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        NHALlamaConfig(num_hidden_layers=2, **fields)


def test_configuration_round_trip(tmp_path: Path) -> None:
    config = NHALlamaConfig(num_hidden_layers=3, nha_windows=[0, None, 7], nha_tau=4.0, nha_slot_bias=False)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, LlamaConfig) and again.to_diff_dict() == config.to_diff_dict()
    assert again.nha_windows == [0, None, 7] and again.nha_tau == 4.0 and again.nha_slot_bias is False


def test_a_model_from_a_configuration_alone() -> None:
    config = NHALlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        nha_windows=[4, None],
    )
    model = NHALlamaForCausalLM(config)
    gate = nha_layers(model)[0][1].nha
    assert torch.equal(gate.slot_q_scale, torch.ones(2, 16)) and torch.equal(gate.slot_bias, torch.zeros(2))
    assert gate.gate_proj.weight.std() > 0 and torch.equal(gate.gate_proj.bias, torch.zeros(128))
