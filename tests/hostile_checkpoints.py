"""Hostile and damaged checkpoints, one kind each: what is done to a good model folder, and what the refusal says."""

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NORM, KEY = "model.norm.weight", "model.layers.1.self_attn.k_proj.weight"
MARKER = "code-was-run"
Damage = Callable[[Path], object]


@dataclass(frozen=True)
class Kind:
    """One kind: `damage` changes a copy of a good folder (`sharded` or in one file); `words` must be in the refusal."""

    damage: Damage
    words: str
    sharded: bool = False
    options: dict[str, bool] = field(default_factory=dict)


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join(path: Path, header: Any, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def header(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Damage to the header of the one weight file; `change` returns another header, bytes, or None for its own."""

    def damage(folder: Path) -> None:
        found, data = split(folder / WEIGHTS)
        join(folder / WEIGHTS, change(found) or found, data)

    return damage


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        change(found)
        save_file(found, folder / WEIGHTS, {"format": "pt"})

    return damage


def config(**changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        found = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(found | changes))

    return damage


def index(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(folder: Path) -> None:
        found = json.loads((folder / INDEX).read_text())
        change(found["weight_map"])
        (folder / INDEX).write_text(json.dumps(found))

    return damage


def index_text(text: str) -> Damage:
    return lambda folder: (folder / INDEX).write_text(text)


def raw(change: Callable[[bytes], bytes]) -> Damage:
    return lambda folder: (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def in_place_of_a_shard(make: Callable[[Path], Any]) -> Damage:
    def damage(folder: Path) -> None:
        outside = folder.parent / "outside.safetensors"
        shards(folder)[0].rename(outside)
        make(shards(folder)[0].with_name(f"model-00001-of-{len(shards(folder)) + 1:05d}.safetensors"))

    return damage


def same_tensor_twice(folder: Path) -> None:
    first, second = shards(folder)[:2]
    both = load_file(second)
    both[next(iter(load_file(first)))] = torch.zeros(4)
    save_file(both, second, {"format": "pt"})


def unlisted_tensor(folder: Path) -> None:
    first = shards(folder)[0]
    save_file(load_file(first) | {"extra.weight": torch.zeros(4)}, first, {"format": "pt"})


def oversized_header(folder: Path) -> None:
    """A header of 100 MB and one byte, in a sparse file that is long enough for it."""
    with (folder / WEIGHTS).open("wb") as file:
        file.write((100_000_001).to_bytes(8, "little") + b"{")
        file.truncate(100_000_100)


def duplicate_in_header(folder: Path) -> None:
    found, data = split(folder / WEIGHTS)
    entry = json.dumps({NORM: found[NORM]})[1:-1]
    join(folder / WEIGHTS, (json.dumps(found)[:-1] + ", " + entry + "}").encode(), data)


def duplicate_in_index(folder: Path) -> None:
    found = json.loads((folder / INDEX).read_text())
    entries = json.dumps(found["weight_map"])[:-1] + f', "{NORM}": "model-00001-of-00009.safetensors"}}'
    (folder / INDEX).write_text('{"metadata": {}, "weight_map": ' + entries + "}")


def overlap(found: dict[str, Any]) -> None:
    size = found[NORM]["data_offsets"][1] - found[NORM]["data_offsets"][0]
    before = max(e["data_offsets"][0] for n, e in found.items() if n != NORM and n != "__metadata__")
    found[NORM]["data_offsets"] = [before, before + size]


def gap(folder: Path) -> None:
    found, data = split(folder / WEIGHTS)
    last = max((n for n in found if n != "__metadata__"), key=lambda name: found[name]["data_offsets"])
    found[last]["data_offsets"] = [offset + 64 for offset in found[last]["data_offsets"]]
    join(folder / WEIGHTS, found, data + bytes(64))


class _Code:
    """Unpickled without care, it writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def pickled(content: Callable[[Path], Any]) -> Damage:
    """The weights as `pytorch_model.bin` in place of safetensors; `content` makes what is pickled."""

    def damage(folder: Path) -> None:
        made = content(folder)
        (folder / WEIGHTS).unlink()
        if isinstance(made, bytes):
            (folder / "pytorch_model.bin").write_bytes(made)
        else:
            torch.save(made, folder / "pytorch_model.bin")

    return damage


def weights_of(folder: Path) -> dict[str, Any]:
    return load_file(folder / WEIGHTS)


def pickle_index_outside(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder.parent / "outside.bin")
    (folder / WEIGHTS).unlink()
    text = json.dumps({"weight_map": {NORM: "../outside.bin"}})
    (folder / "pytorch_model.bin.index.json").write_text(text)


def custom_code(folder: Path) -> None:
    config(model_type="mystery", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})(folder)
    (folder / "evil.py").write_text(f"open({str(folder.parent / MARKER)!r}, 'w')\n")


def linked(name: str, target: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return damage


def fifo(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return damage


def _set(found: dict[str, Any], name: str, **changes: Any) -> None:
    found[name] |= changes


PICKLE = {"allow_pickle": True}
NAN, INFINITY = float("nan"), float("-inf")
KINDS: dict[str, Kind] = {
    "data truncated": Kind(raw(lambda data: data[:-1000]), "is truncated"),
    "bytes after the data": Kind(raw(lambda data: data + b"x"), "is too long"),
    "empty file": Kind(raw(lambda data: b""), "truncated inside its header"),
    "header truncated": Kind(raw(lambda data: data[:100]), "truncated inside its header"),
    "header longer than the file": Kind(raw(lambda data: b"\xff" * 8 + data[8:]), "truncated inside its header"),
    "header over 100 MB": Kind(oversized_header, "100000001 bytes; at most 100000000"),
    "header no JSON": Kind(header(lambda found: b"{no json at all}"), "its header is not JSON"),
    "header a list": Kind(header(lambda found: b"[1, 2]"), "its header is no JSON object"),
    "header nested 100,000 deep": Kind(header(lambda found: b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "not JSON"),
    "metadata no texts": Kind(header(lambda found: _set(found, "__metadata__", format=1)), "__metadata__"),
    "tensor twice in a header": Kind(duplicate_in_header, f"its header has {NORM} twice"),
    "tensors overlap": Kind(header(overlap), "overlaps"),
    "gap between tensors": Kind(gap, "64 bytes between"),
    "negative offsets": Kind(header(lambda found: _set(found, NORM, data_offsets=[-256, 0])), "has the data_offsets"),
    "offsets reversed": Kind(header(lambda found: _set(found, NORM, data_offsets=[256, 0])), "has the data_offsets"),
    "offsets unlike dtype and shape": Kind(header(lambda found: _set(found, NORM, dtype="F64")), f"{NORM}: 256 bytes"),
    "shape of 2^124 values": Kind(
        header(lambda found: _set(found, NORM, shape=[1 << 62, 1 << 62])), f"{NORM}: 256 bytes, but F32"
    ),
    "unknown dtype": Kind(header(lambda found: _set(found, NORM, dtype="F31")), "has the dtype F31"),
    "NaN": Kind(tensors(lambda found: found[KEY][3].fill_(NAN)), f"{KEY} holds NaN or infinity"),
    "infinity": Kind(tensors(lambda found: found[KEY][-1, -1:].fill_(INFINITY)), f"{KEY} holds NaN or infinity"),
    "shape unlike config.json": Kind(config(intermediate_size=100), "mlp.gate_proj.weight has shape [96, 64]"),
    "base tensor missing": Kind(tensors(lambda found: found.pop(KEY)), KEY),
    "integer weights": Kind(tensors(lambda found: found.update({KEY: found[KEY].to(torch.int8)})), f"{KEY} is I8"),
    "index leads out by ../": Kind(
        index(lambda found: found.update({NORM: "../outside.safetensors"})), "../outside.safetensors", sharded=True
    ),
    "index leads out by an absolute path": Kind(
        index(lambda found: found.update({NORM: "/etc/passwd"})), "the file /etc/passwd", sharded=True
    ),
    "index with control characters": Kind(
        index(lambda found: found.update({NORM: "a\n\x1b[2Jb.safetensors"})), "a??[2Jb.safetensors", sharded=True
    ),
    "shard a link out of the folder": Kind(
        in_place_of_a_shard(lambda shard: shard.symlink_to("../outside.safetensors")), "link that leaves", sharded=True
    ),
    "shard a link to a device": Kind(
        in_place_of_a_shard(lambda shard: shard.symlink_to("/dev/zero")), "link that leaves", sharded=True
    ),
    "shard a link to nothing": Kind(
        in_place_of_a_shard(lambda shard: shard.symlink_to("absent")), "link to nothing", sharded=True
    ),
    "shard a folder": Kind(in_place_of_a_shard(lambda shard: shard.mkdir()), "is a folder, not a file", sharded=True),
    "shard a named pipe": Kind(in_place_of_a_shard(lambda shard: os.mkfifo(shard)), "is a named pipe", sharded=True),
    "shard missing": Kind(in_place_of_a_shard(lambda shard: None), "is missing, but the index names it", sharded=True),
    "index a named pipe": Kind(fifo(INDEX), "is a named pipe", sharded=True),
    "index no JSON": Kind(index_text("weight_map: none"), "the index is not JSON", sharded=True),
    "index a list": Kind(index_text("[]"), "the index is a JSON list", sharded=True),
    "index without weight_map": Kind(index_text('{"weight_map": [1]}'), "no `weight_map` object", sharded=True),
    "index values no texts": Kind(index(lambda found: found.update({NORM: 7})), f"{NORM} the file 7", sharded=True),
    "tensor twice in the index": Kind(duplicate_in_index, f"the index has {NORM} twice", sharded=True),
    "tensor in two shards": Kind(same_tensor_twice, "which the index puts into", sharded=True),
    "tensor that the index does not list": Kind(unlisted_tensor, "extra.weight, which the index does", sharded=True),
    "tensor that its shard lacks": Kind(
        index(lambda found: found.update({"absent.weight": found[NORM]})), "lacks absent.weight", sharded=True
    ),
    "a billion layers": Kind(config(num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
    "a thousand layers too many": Kind(config(num_hidden_layers=1002), "the weights have 2 layers"),
    "negative hidden size": Kind(config(hidden_size=-64), "hidden_size is -64"),
    "no heads": Kind(config(num_attention_heads=0), "num_attention_heads is 0"),
    "layers a text": Kind(config(num_hidden_layers="2"), "num_hidden_layers"),
    "layers not a number": Kind(config(num_hidden_layers=NAN), "num_hidden_layers"),
    "vocabulary of 10^30": Kind(config(vocab_size=10**30), "vocab_size is an integer of many digits"),
    "another vocabulary": Kind(config(vocab_size=1 << 26), "model.embed_tokens.weight has shape [264, 64]"),
    "heads that do not divide": Kind(config(num_attention_heads=7, head_dim=None), "no model can be made of it"),
    "activation unknown": Kind(config(hidden_act="exec"), "no model can be made of it"),
    "rope unknown": Kind(config(rope_parameters={"rope_type": "evil", "rope_theta": 1}), "no model can be made"),
    "config.json no JSON": Kind(
        lambda folder: (folder / "config.json").write_text("{"), "config.json: cannot be read as JSON"
    ),
    "config.json a named pipe": Kind(fifo("config.json"), "holds no config.json"),
    "config.json with code of its own": Kind(custom_code, "models of type mystery"),
    "config.json of quantised weights": Kind(config(quantization_config={"quant_method": "fp8"}), "are quantised"),
    "tokenizer a link out of the folder": Kind(linked("tokenizer.json", "/etc/passwd"), "tokenizer.json: is a link"),
    "pickle without the flag": Kind(pickled(weights_of), "--allow-pickle"),
    "pickle that runs code": Kind(
        pickled(lambda folder: {NORM: _Code(folder.parent / MARKER)}), "asks for posix.system;", options=PICKLE
    ),
    "pickle of the old format that runs code": Kind(
        pickled(lambda folder: pickle.dumps({NORM: _Code(folder.parent / MARKER)})),
        "asks for more than tensors",
        options=PICKLE,
    ),
    "pickle of other things": Kind(
        pickled(lambda folder: {"epoch": 3, **weights_of(folder)}), "epoch is int, not a tensor", options=PICKLE
    ),
    "pickle damaged": Kind(pickled(lambda folder: b"PK\x03\x04" + b"x" * 400), "pytorch_model.bin", options=PICKLE),
    "pickle with NaN": Kind(
        pickled(lambda folder: {**weights_of(folder), NORM: torch.full((64,), NAN)}),
        f"{NORM} holds NaN",
        options=PICKLE,
    ),
    "pickle index leads out by ../": Kind(pickle_index_outside, "../outside.bin", options=PICKLE),
}
