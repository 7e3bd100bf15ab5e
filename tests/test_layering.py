"""Imports run one way: cli -> app -> work -> {convert, data} -> modeling -> nha_kernels, and the base imports nothing.

A new module has to be put into its layer here.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TORCHES = {"torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "matplotlib", "nha_kernels"}

BASE = {
    "nha_convert",
    "nha_convert.errors",
    "nha_convert.families",
    "nha_convert.settings",
    "nha_convert.data_settings",
    "nha_convert.settings_types",
    "nha_convert.stage_settings",
    "nha_convert.recipe_errors",
    "nha_convert.recipe",
    "nha_convert.recipe_choice",
    "nha_convert.model_files",
    "nha_convert.weights.weight_files",
    "nha_convert.weights.config_check",
    "nha_convert.work_folder",
    "nha_convert.files",
    "nha_convert.plan",
    "nha_convert.quantities",
    "nha_convert.plan_fit",
    "nha_convert.plan_start",
    "nha_convert.plan_tables",
    "nha_convert.gpus",
    "nha_convert.corpus",
    "nha_convert.recall_documents",
    "nha_convert.text_sources",
    "nha_convert.evaluate.table",
}
"""Importable by every layer above modeling; imports only itself and, at module level, no torch."""
KERNELS, MODELING, MODELS, WORK, PIPELINE, COMMANDS, CLI = range(7)
LAYERS = {
    "nha_kernels": KERNELS,
    "nha_convert.modeling": MODELING,
    "nha_convert.convert": MODELS,
    "nha_convert.model_source": MODELS,
    "nha_convert.swap": MODELS,
    "nha_convert.weights": MODELS,
    "nha_convert.data": MODELS,
    "nha_convert.gate_init": MODELS,
    "nha_convert.gate_calibration": MODELS,
    "nha_convert.gate_attended": MODELS,
    "nha_convert.far_attention": MODELS,
    "nha_convert.gate_inputs": MODELS,
    "nha_convert.remote_code": MODELS,
    "nha_convert.devices": MODELS,
    "nha_convert.layer_slices": MODELS,
    "nha_convert.streamed": MODELS,
    "nha_convert.train": WORK,
    "nha_convert.search": WORK,
    "nha_convert.search_app": COMMANDS,
    "nha_convert.evaluate": WORK,
    "nha_convert.evaluate_checkpoint": WORK,
    "nha_convert.run_folder": WORK,
    "nha_convert.saved_evaluation": WORK,
    "nha_convert.publish": WORK,
    "nha_convert.publish.export_request": COMMANDS,
    "nha_convert.bench_checkpoint": WORK,
    "nha_convert.bench_app": COMMANDS,
    "nha_convert.provenance": WORK,
    "nha_convert.report": WORK,
    "nha_convert.report_data": WORK,
    "nha_convert.report_heatmaps": WORK,
    "nha_convert.report_plots": WORK,
    "nha_convert.report_style": WORK,
    "nha_convert.report_svg": WORK,
    "nha_convert.report_tables": WORK,
    "nha_convert.report_verdict": WORK,
    "nha_convert.memory_tracker": MODELS,
    "nha_convert.plan_memory": WORK,
    "nha_convert.plan_time": WORK,
    "nha_convert.generate": WORK,
    "nha_convert.inference_windows": MODELS,
    "nha_convert.serve": WORK,
    "nha_convert.doctor": WORK,
    "nha_convert.preflight": WORK,
    "nha_convert.pipeline": PIPELINE,
    "nha_convert.command_options": COMMANDS,
    "nha_convert.recipes_app": COMMANDS,
    "nha_convert.checkpoint_app": COMMANDS,
    "nha_convert.app": COMMANDS,
    "cli": CLI,
}
TORCH_FREE = BASE | {
    f"nha_convert.{name}"
    for name in (
        *("preflight", "command_options", "publish.export_request", "publish.hub"),
        *("recipes_app", "checkpoint_app", "bench_app", "search_app", "app", "provenance", "report_data"),
        *("saved_evaluation", "evaluate.layer_table"),
        *("search", "search.record", "search.request", "search.slot_request", "search.choose", "search.tables"),
    )
}


def modules() -> dict[str, Path]:
    """Module name -> file, of all that is shipped."""
    found = {"cli": ROOT / "cli.py"}
    for parent, folder in ((ROOT, "nha_convert"), (ROOT / "kernels", "nha_kernels")):
        for path in (parent / folder).rglob("*.py"):
            parts = path.relative_to(parent).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def layer(module: str) -> int | None:
    """The layer of a module or of the closest package that contains it; None for the base."""
    if module in BASE:
        return None
    while module not in LAYERS:
        module, dot, _ = module.rpartition(".")
        assert dot, f"{module} stands in no layer of this test: put it into one"
    return LAYERS[module]


def imports(module: str, *, module_level_only: bool) -> Iterator[str]:
    """Absolute names that a module imports; names imported from a package count as modules where they are ones."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]

    def left_out(node: ast.AST) -> bool:
        if isinstance(node, ast.If):
            return "TYPE_CHECKING" in ast.unparse(node.test)
        return module_level_only and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))

    def walk(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = package.rsplit(".", child.level - 1)[0] if child.level else ""
                name = ".".join(part for part in (base, child.module) if part)
                inner = [f"{name}.{alias.name}" for alias in child.names]
                yield from (one if one in MODULES else name for one in inner)
            elif not left_out(child):
                yield from walk(child)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")))


def ways_back(module: str) -> list[str]:
    """Imports that a module may not have, wherever in the file they stand."""
    own = layer(module)
    wrong = []
    for name in imports(module, module_level_only=False):
        if name not in MODULES:
            continue
        other = layer(name)
        if own is None or own in (KERNELS, MODELING):
            allowed = other == own or (own == MODELING and other == KERNELS)
            allowed = allowed or (own == MODELING and name in ("nha_convert.modeling", "nha_convert.families"))
        else:
            allowed = other is None or other <= own
        if not allowed:
            wrong.append(f"{module} imports {name}")
    return wrong


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_import_goes_back(module: str) -> None:
    assert ways_back(module) == []


@pytest.mark.parametrize("module", sorted(TORCH_FREE))
def test_no_torch_at_module_level(module: str) -> None:
    seen, waiting = set(), [module]
    while waiting:
        here = waiting.pop()
        seen.add(here)
        for name in imports(here, module_level_only=True):
            assert name.split(".")[0] not in TORCHES, f"{here}, which {module} imports, imports {name}"
            if name in MODULES and name not in seen:
                waiting.append(name)


def test_importing_the_command_line_loads_no_torch() -> None:
    code = f"import sys; import {', '.join(sorted(TORCH_FREE))}; print(sorted({TORCHES} & set(sys.modules)))"
    path = f"{ROOT}:{ROOT / 'kernels'}"
    answer = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path.split(':')!r}; {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout.strip() == "[]"


def test_kernels_is_no_package() -> None:
    """An importable package `kernels` would be taken by transformers for the PyPI library of that name."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_modeling_travels() -> None:
    """What is copied flat into checkpoints imports its own files one-dot, and ours only with the module's name."""
    for name, path in MODULES.items():
        if layer(name) not in (KERNELS, MODELING):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module and "." not in node.module, f"{path}:{node.lineno}"
            elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("nha_kernels"):
                assert str(node.module).count(".") == 1, f"{path}:{node.lineno}: name the module: nha_kernels.X"


def test_the_walker_sees_a_way_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The test itself can fail: an import inside a function, and a relative one, are both seen."""
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from .train import run_stage\n    import nha_convert.app\n")
    monkeypatch.setitem(MODULES, "nha_convert.convert", bad)
    assert ways_back("nha_convert.convert") == [
        "nha_convert.convert imports nha_convert.train",
        "nha_convert.convert imports nha_convert.app",
    ]


def test_every_package_is_shipped() -> None:
    """Packages are listed by hand in pyproject.toml, because kernels/ must not be one."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = ast.literal_eval(text.partition("\npackages = ")[2].partition("]")[0] + "]")
    packages = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    assert set(listed) == packages | {"nha_convert.recipes"}
