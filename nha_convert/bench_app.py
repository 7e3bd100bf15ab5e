"""The command `bench`. As in `app`: heavy imports stand inside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from pydantic import TypeAdapter, ValidationError

from .command_options import (
    QuietOption,
    SetOption,
    checkpoint_folder,
    prepare_libraries,
    print_rich,
)
from .errors import InputError
from .settings_types import Tokens

bench_app = typer.Typer(rich_markup_mode=None)


@bench_app.command(short_help="Time a checkpoint beside its teacher.")
def bench(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="checkpoint folder, or a run folder")],
    teacher: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="model to compare with; the checkpoint's own backbone if not given"),
    ] = None,
    contexts: Annotated[
        str | None, typer.Option(metavar="LIST", help="tokens before the decoded one, such as 1k,4k,16k,32k")
    ] = None,
    prefill: Annotated[
        str | None, typer.Option(metavar="LIST", help="tokens read in one call, such as 1k,4k; `none` leaves it out")
    ] = None,
    set_: SetOption = None,
    device: Annotated[str, typer.Option(help="auto, cpu, mps, cuda or cuda:N")] = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the numbers here")] = None,
    quiet: QuietOption = False,
) -> None:
    """Times a checkpoint beside its teacher: a decoded token, a prefill, bytes of cache.

    \b
    nha-convert bench runs/demo
    nha-convert bench my-model/ --contexts 1k,32k,128k --prefill none --json numbers.json
    nha-convert bench runs/demo --set nha.window=256 --set evaluate.benchmark_repeats=100

    Teacher and student take turns in one process. Caches for decoding are filled with random keys and values, so long
    contexts are cheap. A run folder gets the numbers as bench.json, which `nha-convert report` shows. Settings are
    those under `evaluate.benchmark`, and the windows (nha.window, nha.full_attention_layers).
    """
    from .files import write_json
    from .recipe import evaluate_settings, window_settings

    folder = checkpoint_folder(checkpoint)
    if json_file is not None and json_file.is_dir():
        raise InputError(f"--json {json_file}: is a folder; name a file")
    of_windows = [one for one in set_ or [] if one.removeprefix("~").startswith("nha.")]
    windows = window_settings(of_windows, "bench")
    settings = evaluate_settings(folder, [one for one in set_ or [] if one not in of_windows], "bench")
    if contexts is not None:
        settings.benchmark_contexts = _lengths("--contexts", contexts)
    if prefill is not None:
        settings.benchmark_prefill = [] if prefill == "none" else _lengths("--prefill", prefill)
    prepare_libraries(quiet)
    from .bench_checkpoint import BENCH, bench_checkpoint
    from .evaluate.benchmark_table import render_bench

    result = bench_checkpoint(folder, settings, teacher=teacher, device=device, windows=windows, quiet=quiet)
    of_run = checkpoint.expanduser() if folder != checkpoint.expanduser() else None
    if of_run is not None:
        write_json(of_run / BENCH, result)
    if json_file is not None:
        write_json(json_file, result)
    if not quiet:
        print_rich(render_bench(result))
        if of_run is not None:
            print(f"\nwritten to {of_run / BENCH}; into its page: nha-convert report {of_run}")


def _lengths(option: str, text: str) -> list[int]:
    """Counts of tokens with commas between.

    Raises:
        InputError: one is none.
    """
    lengths = []
    for part in text.split(","):
        try:
            lengths.append(TypeAdapter(Tokens).validate_python(part.strip()))
        except ValidationError as error:
            said = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
            raise InputError(f"{option} {text!r}: {said}; give counts with commas between, such as 1k,4k,32k") from None
    return lengths
