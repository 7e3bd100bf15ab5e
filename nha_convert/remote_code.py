"""The code that travels with a checkpoint: flat copies that `transformers` can load alone. Imports no torch.

`transformers` copies only what it reaches through `from .name import ...`, and refuses a file that imports
a package the machine lacks. So the modeling files' `from nha_kernels.ops import ...` and
`from nha_convert.families import ...` become `from .ops import ...` and `from .families import ...`, these files lie
beside them, and nothing else in a file changes.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import sys
from pathlib import Path

ENTRY_FILES = ("configuration_nha.py", "modeling_nha.py")
PACKAGES = frozenset({"torch", "transformers", "safetensors"})
"""What a machine needs to load a checkpoint, beside Python's own library."""

_OWN_IMPORT = re.compile(r"^(\s*)from (?:nha_kernels|nha_convert)\.(\w+) import", re.MULTILINE)
_RELATIVE_IMPORT = re.compile(
    r"^\s*from\s+\.(\S+)\s+import", re.MULTILINE
)  # as transformers scans, docstrings included


def code_files() -> dict[str, str]:
    """File name -> source of every file a checkpoint needs, imports rewritten.

    Raises:
        RuntimeError: a file imports something that a flat folder on a machine without our package cannot give.
    """
    here = Path(__file__).resolve().parent
    folders = [here / "modeling", _kernels_folder(), here]
    files: dict[str, str] = {}
    wanted = list(ENTRY_FILES)
    while wanted:
        name = wanted.pop()
        if name in files:
            continue
        path = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if path is None:
            raise RuntimeError(f"{name} is imported by the modeling code, but no folder that travels has it")
        files[name] = _OWN_IMPORT.sub(r"\1from .\2 import", path.read_text(encoding="utf-8"))
        check_imports(name, files[name])
        wanted += [f"{module}.py" for module in _RELATIVE_IMPORT.findall(files[name])]
    return dict(sorted(files.items()))


def check_imports(name: str, source: str) -> None:
    """Refuse what remote code cannot do.

    Raises:
        RuntimeError: a relative import that is not `from .module import x`, or outside `try` an absolute import of
            anything but Python's library, torch, transformers and safetensors.
    """
    allowed = PACKAGES | set(sys.stdlib_module_names)
    pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        node = pending.pop()
        roots: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.level:
            if node.level != 1 or not node.module or "." in node.module:
                raise RuntimeError(f"{name}:{node.lineno}: remote code needs `from .module import x`")
        elif isinstance(node, ast.ImportFrom):
            roots = [(node.module or "").split(".")[0]]
        elif isinstance(node, ast.Import):
            roots = [alias.name.split(".")[0] for alias in node.names]
        for root in roots:
            if root not in allowed:
                raise RuntimeError(f"{name}: imports {root} outside `try`, which a clean machine may lack")
        pending += [child for child in ast.iter_child_nodes(node) if not isinstance(node, ast.Try)]


def add_code(folder: Path) -> list[str]:
    """Write the code into a checkpoint folder and point its config.json (`auto_map`) at it.

    Args:
        folder: holds the config.json of an NHA model, with `architectures`.
    Returns:
        names of the files written, sorted.
    """
    files = code_files()
    for name, source in files.items():
        (folder / name).write_text(source, encoding="utf-8")
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    family = config["architectures"][0].removesuffix("ForCausalLM")
    config["auto_map"] = {
        "AutoConfig": f"configuration_nha.{family}Config",
        "AutoModel": f"modeling_nha.{family}Model",
        "AutoModelForCausalLM": f"modeling_nha.{family}ForCausalLM",
    }
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return list(files)


def _kernels_folder() -> Path:
    spec = importlib.util.find_spec("nha_kernels")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("nha_kernels is not importable; install the project with `pip install -e .`")
    return Path(next(iter(spec.submodule_search_locations)))
