"""Do exported folders generate the same tokens in clean environments, old and new transformers, as in this project?

    python tools/clean_environments.py                             transformers 5.17.0 and 5.23.0
    python tools/clean_environments.py --work DIR 5.17.0           other versions; DIR is kept and used again

Makes a virtual environment per version with torch, transformers and safetensors alone, exports every pico model of the
tests and the embedded teacher, and compares what `generation_probe.py` finds there with what it finds here.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.acceptance_base import ROOT, run

VERSIONS = ("5.17.0", "5.23.0")
PROBE = Path(__file__).resolve().with_name("generation_probe.py")
NO_PACKAGE = "import importlib.util as u; assert not u.find_spec('nha_convert') and not u.find_spec('nha_kernels')"


def make_environment(folder: Path, version: str) -> str:
    """A virtual environment with torch, transformers and safetensors; an existing one is used again.

    Returns:
        its Python.
    """
    python = folder / "bin" / "python"
    if not (folder / "complete").is_file():
        pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        wanted = [pin for pin in pins if pin.split("==")[0] in ("torch", "safetensors")]
        run([sys.executable, "-m", "venv", "--clear", str(folder)], folder.parent)
        run([str(python), "-m", "pip", "install", "-q", *wanted, f"transformers=={version}"], folder.parent)
        (folder / "complete").touch()
    run([str(python), "-I", "-c", NO_PACKAGE], folder.parent)
    return str(python)


def export_models(work: Path) -> dict[str, str]:
    """Export every pico model and the embedded teacher as students with moved gates.

    Returns:
        name -> folder. Every other pico model keeps its first layer's full attention.
    """
    import torch
    from transformers import AutoTokenizer
    from transformers.utils import logging

    from nha_convert.convert import load_student, new_parameter_names
    from nha_convert.publish.export import export_model
    from nha_convert.recipe import embedded_teacher
    from nha_convert.settings import NHASettings
    from tests.conftest import FURTHER_MODELS, PICO_MODELS, make_pico

    logging.disable_progress_bar()
    teachers = {name: make_pico(name, work / "teachers" / name) for name in (*PICO_MODELS, *FURTHER_MODELS)}
    teachers["embedded"] = embedded_teacher()
    folders = {}
    for number, (name, teacher) in enumerate(teachers.items()):
        settings = NHASettings(slots=8, window=16, sinks=2, full_attention_layers=[0] if number % 2 else [])
        student = load_student(teacher, settings, dtype=torch.float32)
        new, draw = new_parameter_names(student), torch.Generator().manual_seed(number)
        with torch.no_grad():
            for key, parameter in student.named_parameters():
                if key in new:
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
        out = work / "exports" / name
        export_model(student, AutoTokenizer.from_pretrained(teacher), out, teacher_dir=teacher)
        folders[name] = str(out)
    return folders


def probe(python: str, folders: dict[str, str], work: Path, *, package: bool) -> dict[str, Any]:
    """What one Python generates: without this project's package, or with its classes in place of the folders' code."""
    job, result = work / "job.json", work / "result.json"
    job.write_text(json.dumps({"folders": folders, "package": package}), encoding="utf-8")
    environment = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(work / "modules"), "HF_HOME": str(work / "home")}
    if package:
        environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'kernels'}"
    run([python, *([] if package else ["-I"]), str(PROBE), str(job), str(result)], work, environment)
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    own = "nha_convert." if package else "transformers_modules."
    for name, model in found["models"].items():
        if not model["class"].startswith(own):
            raise SystemExit(f"{name}: {model['class']} was used, not {own}")
    return found


def differences(found: dict[str, dict[str, Any]]) -> list[str]:
    """Where the environments' tokens differ, and where a way of generating differs from another of its environment."""
    reference = found["package"]["models"]
    wrong = []
    for environment, result in found.items():
        for name, model in result["models"].items():
            tokens = model["tokens"]
            wrong += [
                f"{name}, {way}: {environment} differs from the package"
                for way in tokens
                if tokens[way] != reference[name]["tokens"][way]
            ]
            for one, other in (("cache", "no cache"), ("left padding", "each alone")):
                if tokens[one] != tokens[other]:
                    wrong.append(f"{name}, {environment}: {one} differs from {other}")
    return wrong


def compare(work: Path, versions: tuple[str, ...] = VERSIONS) -> dict[str, Any]:
    """Export, generate everywhere, compare.

    Args:
        work: folder for environments and exports; environments found there are used again.
    Returns:
        {"models", "versions", "ways", "tokens" (in each environment), "largest_logit_difference", "wrong": [text]}.
    """
    work = work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    for name in ("teachers", "exports", "modules"):
        shutil.rmtree(work / name, ignore_errors=True)
    folders = export_models(work)
    found = {"package": probe(sys.executable, folders, work, package=True)}
    for version in versions:
        found[version] = probe(make_environment(work / f"venv-{version}", version), folders, work, package=False)
        if found[version]["transformers"] != version:
            raise SystemExit(f"{work}: transformers {found[version]['transformers']} is installed, not {version}")
    reference = found["package"]["models"]
    return {
        "models": list(folders),
        "versions": list(versions),
        "ways": list(reference["embedded"]["tokens"]),
        "tokens": sum(_count(way) for model in reference.values() for way in model["tokens"].values()),
        "largest_logit_difference": max(
            abs(ours - theirs)
            for result in found.values()
            for name, model in result["models"].items()
            for row, wanted in zip(model["logits"], reference[name]["logits"])
            for ours, theirs in zip(row, wanted)
        ),
        "wrong": differences(found),
    }


def _count(tokens: list[Any]) -> int:
    return sum(_count(item) if isinstance(item, list) else 1 for item in tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("versions", nargs="*", default=list(VERSIONS), help="of transformers")
    parser.add_argument("--work", type=Path, help="folder to keep environments and exports in")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = compare(options.work or Path(folder), tuple(options.versions))
    print(json.dumps(result, indent=2))
    sys.exit(1 if result["wrong"] else 0)


if __name__ == "__main__":
    main()
