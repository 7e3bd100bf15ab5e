"""The command `search`. As in `app`: heavy imports stand inside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .command_options import JsonOption, QuietOption, SetOption, prepare_libraries, print_json, print_rich
from .errors import InputError
from .settings_types import DEFAULT_METHOD, SEARCH_METHODS

search_app = typer.Typer(rich_markup_mode=None)


@search_app.command(short_help="Which layers need full attention; windows or slots of the others.")
def search(
    target: Annotated[
        str, typer.Argument(metavar="RECIPE|MODEL|CKPT", help="recipe, base model, NHA checkpoint or run folder")
    ],
    full: Annotated[int | None, typer.Option(min=1, metavar="N", help="keep this many layers full")] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SHARE", help="cache budget as a share of full attention everywhere: 25%")
    ] = None,
    context: Annotated[int, typer.Option(min=1, help="tokens at which caches are compared")] = 32768,
    method: Annotated[
        str | None, typer.Option(help=f"{', '.join(SEARCH_METHODS)}; {DEFAULT_METHOD} if not given")
    ] = None,
    windows: Annotated[
        str | None, typer.Option(metavar="LIST", help="windows to choose among, such as 64,256,1024,full")
    ] = None,
    slots: Annotated[
        str | None, typer.Option(metavar="LIST", help="counts of slots to choose among, such as 16,64,256")
    ] = None,
    text: Annotated[
        str | None, typer.Option(metavar="FILE", help="text to measure on; the recipe's own if not given")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(metavar="MODEL", help="what a checkpoint is compared with; its own backbone if not")
    ] = None,
    set_: SetOption = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="write search.json and search.md here")] = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measures what each layer loses with small windows, and chooses; trains nothing and changes no model.

    \b
    nha-convert search Qwen/Qwen3-0.6B --full 7
    nha-convert search demo --method recall --full 1
    nha-convert search Qwen/Qwen3-0.6B --memory 25% --context 32768 --windows 64,256,1024,full
    nha-convert search runs/demo --memory 50% --context 4096
    nha-convert search align-only --slots 16,32,64,128,160

    Prints a table of losses, the choice, a curve of quality against cache memory, and the --set line to use. On a
    finished model it searches windows at inference, without retraining. --slots shares out the slots of a conversion
    by layer: within the cache that nha.slots takes, or --memory, a share of full attention everywhere at --context.
    `nha.full_attention_layers: auto:N` in a recipe does the same as --full N when a run begins.
    """
    from .files import write_json, write_text
    from .search.request import search_request

    if out is not None and out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is a file; name a folder")
    request = search_request(
        target,
        full=full,
        memory=memory,
        context=context,
        method=method,
        windows=windows,
        slots=slots,
        text=text,
        teacher=teacher,
        overrides=set_,
    )
    prepare_libraries(quiet or as_json)
    from .search.find import find_windows
    from .search.slot_counts import find_slots
    from .search.tables import markdown, render

    find = find_windows if request.slots is None else find_slots
    found = find(request, quiet=quiet or as_json)
    if out is not None:
        write_json(out / "search.json", found)
        write_text(out / "search.md", markdown(found))
    if as_json:
        print_json(found)
    elif not quiet:
        print_rich(render(found))
