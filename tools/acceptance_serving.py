"""Acceptance lines of what happens to a converted model elsewhere: served to many, loaded in clean environments."""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tools.acceptance_base import line


@line("serve", "`nha-convert serve`: 8 chat requests at once over loopback, greedy", "8 of 8 equal to `generate`")
def serve() -> dict[str, Any]:
    from tests.serving.served import CLI, PROMPTS, chat, generated, make_folder, running

    values = {}
    with tempfile.TemporaryDirectory() as root:
        folder = make_folder(Path(root) / "model")
        wanted = generated(folder, PROMPTS)
        command = [*CLI, "serve", folder.name, "--device", "cpu"]
        with running(command, folder.name, Path(root) / "log", folder.parent) as server:
            for name, stream in (("whole", False), ("streamed", True)):
                with ThreadPoolExecutor(len(PROMPTS)) as pool:
                    answers = {p: pool.submit(chat, server, p, tokens, stream) for p, tokens in PROMPTS.items()}
                values[name] = sum(answer.result() == wanted[prompt] for prompt, answer in answers.items())
    text = "; ".join(f"{name}: {equal} of {len(PROMPTS)} equal" for name, equal in values.items())
    return {"measured": text, "met": len(PROMPTS) == 8 and set(values.values()) == {8}, "values": values}


@line(
    "environments",
    "every family's export in clean environments (transformers 5.17.0, 5.23.0; package not installed) and the package",
    "the same tokens: greedy with and without cache, left padding, beams",
)
def environments() -> dict[str, Any]:
    from tools.clean_environments import compare

    with tempfile.TemporaryDirectory() as root:
        found = compare(Path(root))
    text = (
        f"{len(found['models'])} models, {found['tokens']} tokens in each of {len(found['versions'])} environments: "
        f"{'all the same' if not found['wrong'] else '; '.join(found['wrong'])}; "
        f"largest logit difference {found['largest_logit_difference']:.2g}"
    )
    return {"measured": text, "met": not found["wrong"], "values": found}
