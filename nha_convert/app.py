"""The command line: what each command takes and prints. The work is done in the modules it calls.

Heavy imports stand inside the commands, so that `--help` and refusals answer at once.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__
from .bench_app import bench_app
from .checkpoint_app import checkpoint_app
from .command_options import (
    JsonOption,
    QuietOption,
    RecipeArgument,
    SetOption,
    prepare_libraries,
    print_json,
    print_rich,
    require_passed,
    require_run,
)
from .errors import InputError, WorkError
from .gpus import DEFAULT_GPU, Machine, find_machine
from .recipe import Recipe
from .recipes_app import recipes_app
from .search_app import search_app

GPUOption = Annotated[
    str | None,
    typer.Option("--gpu", metavar="NAME", help=f"GPU that hours are estimated for; {DEFAULT_GPU} if not given"),
]
TextOption = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="text that nha.full_attention_layers=auto:N measures on: file, glob, folder"),
]
GPUsOption = Annotated[int | None, typer.Option("--gpus", metavar="N", help="how many of them; 1 if not given")]

app = typer.Typer(
    name="nha-convert",
    help=(
        "Converts a pretrained transformer into a Native Hybrid Attention model: each attention layer becomes gated "
        "memory slots plus a sliding window, distilled from the model itself, measured and exported.\n\n"
        "\b\n"
        "Start here:\n"
        "  nha-convert run demo                   the whole job on a small shipped model, about 5 minutes on a CPU\n"
        "  nha-convert plan Qwen/Qwen3-0.6B       what converting a model would change, train and need\n"
        "  nha-convert run Qwen/Qwen3-0.6B        convert it\n\n"
        "Exit codes: 0 done; 1 the work failed, what was done is kept; 2 the input was wrong, nothing was touched."
    ),
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
app.add_typer(checkpoint_app)
app.add_typer(bench_app)
app.add_typer(search_app)
app.add_typer(recipes_app, name="recipes")


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"nha-convert {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass


@app.command(short_help="The whole job: swap, distil, evaluate, export, report.")
def run(
    recipe: RecipeArgument,
    out: Annotated[Path | None, typer.Option(help="run folder; the recipe's `output` if not given")] = None,
    set_: SetOption = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on with an interrupted run; starts anew where there is none")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything, print the plan, do nothing")] = False,
    gpu: GPUOption = None,
    gpus: GPUsOption = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Converts a model: plan, swap, distil stage by stage, evaluate, export, verify, report.

    \b
    nha-convert run demo
    nha-convert run demo --out runs/mine --set nha.window=32 --set stages.align.tokens=800k
    nha-convert run meta-llama/Llama-3.2-1B --dry-run
    nha-convert run runs/mine --resume

    The run folder then holds the resolved recipe.yaml, metrics.jsonl, eval.json, export/ (the model, loadable with
    plain transformers) and report.html.
    """
    from .preflight import check_inputs, finished
    from .recipe import load_recipe

    machine = find_machine(gpu, gpus)
    if not dry_run and (gpu, gpus) != (None, None):
        raise InputError("--gpu and --gpus belong to --dry-run, which was not given; add it or leave them out")
    settings = load_recipe(recipe, set_ or [])
    if out is not None:
        settings.output = str(out)
    folder = Path(settings.output).expanduser()
    check_inputs(settings, folder, resume)
    if dry_run:
        _print_plan(settings, machine, as_json)
        return
    if resume and finished(folder):
        evaluation = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
    else:
        prepare_libraries(quiet)
        from . import pipeline

        try:
            evaluation = pipeline.run(settings, folder, resume=resume, quiet=quiet)
        except KeyboardInterrupt:
            raise WorkError(
                f"{folder}: interrupted; what was done is kept, go on with: nha-convert run {folder} --resume"
            ) from None
    if not _speaks():
        return
    verification = json.loads((folder / "verify.json").read_text(encoding="utf-8"))
    if as_json:
        print_json({"output": str(folder), "evaluation": evaluation, "verification": verification})
    elif not quiet:
        from .evaluate.suite import summary_table

        print_rich(summary_table(evaluation))
        print(f"\nmodel   {folder / 'export'}\nreport  {folder / 'report.html'}")
    require_passed(verification, folder / "export")


@app.command(short_help="Convert the structure alone; trains nothing.")
def swap(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, model folder or `embedded`")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="folder to write; must be new or empty")],
    set_: SetOption = None,
    copy: Annotated[bool, typer.Option("--copy", help="copy the weights; they are hard-linked where possible")] = False,
    max_shard_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="cut the weights into files of at most this: 2GB, 500MB")
    ] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="read the tensors of pytorch_model*.bin if there are no safetensors")
    ] = False,
    text: TextOption = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Converts the structure alone: new gate tensors beside the untouched weights, nothing trained.

    \b
    nha-convert swap Qwen/Qwen3-0.6B swapped/ --set nha.window=64 --set nha.full_attention_layers=every:4
    nha-convert swap my-model/ swapped/ --copy --max-shard-size 2GB
    nha-convert swap my-model/ swapped/ --set nha.full_attention_layers=auto:4 --text book.txt

    Settings are those under `nha.` and `search.`, and `seed`. The result carries its code and loads with plain
    transformers. Weights are read once, from file to file, and NaN or infinity among them is refused; auto:N also loads
    the model, to measure its layers.
    Untrained, its memory is of little use: `nha-convert run` trains it.
    """
    from .files import write_json
    from .model_files import local_folder
    from .plan import model_dimensions
    from .recipe import swap_recipe
    from .search.record import RECORD
    from .search.request import check_swap_text
    from .weights.weight_files import check_weights, only_pickles
    from .work_folder import check_new_folder

    recipe = check_swap_text(swap_recipe(set_ or []), model, text)
    dimensions = model_dimensions(model)
    folder = local_folder(model)
    if folder is not None and not (allow_pickle and only_pickles(folder)):
        check_weights(folder)
    recipe.nha.planned(dimensions.layers).windows(dimensions.layers)
    check_new_folder(out)
    prepare_libraries(quiet)
    from .swap import swap_checkpoint

    record: dict[str, object] = {}
    if recipe.nha.auto:
        from .search.auto import choose_for_swap

        recipe, record = choose_for_swap(recipe, quiet=quiet)
    report_ = swap_checkpoint(
        model,
        out,
        recipe.nha,
        seed=recipe.seed,
        quiet=quiet,
        copy=copy,
        max_shard_size=max_shard_size,
        allow_pickle=allow_pickle,
    )
    if record:
        write_json(out / RECORD, record)
        report_["search"] = record
    _print_swap(report_, quiet, as_json)


def _print_swap(report_: dict[str, Any], quiet: bool, as_json: bool) -> None:
    if as_json:
        print_json(report_)
    elif not quiet:
        from .quantities import count

        if "search" in report_:
            found = report_["search"]
            print(f"{found['setting']} by {found['method']}: {found['full_attention_layers']} stay full")
        print(
            f"{report_['out']}: {len(report_['nha_layers'])} of {report_['layers']} layers are NHA, "
            f"{count(report_['new_parameters'])} new parameters"
            + (f"; left out: {', '.join(report_['left_out'])}" if report_["left_out"] else "")
        )


def _print_plan(settings: Recipe, machine: Machine, as_json: bool) -> None:
    """What is imported here needs torch."""
    prepare_libraries(quiet=True)
    from .plan import make_plan
    from .plan_memory import stage_cost
    from .plan_tables import render_plan
    from .plan_time import stage_time

    made = make_plan(settings, stage_cost, stage_time, machine)
    print_json(made) if as_json else print_rich(render_plan(made))


@app.command(short_help="What a recipe changes, trains and needs.")
def plan(
    recipe: RecipeArgument,
    set_: SetOption = None,
    gpu: GPUOption = None,
    gpus: GPUsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Says what a recipe will change, train and need, from config.json alone; loads and writes nothing.

    \b
    nha-convert plan demo
    nha-convert plan Qwen/Qwen3-0.6B --gpu A100-80GB --gpus 8
    nha-convert plan Qwen/Qwen3-0.6B --set nha.full_attention_layers=every:8 --json

    Hours are an estimate for the named GPU, from its data sheet and the floors of the kernels.
    """
    from .model_files import is_model_name
    from .recipe import load_recipe
    from .recipe_choice import choose_for

    machine, settings = find_machine(gpu, gpus), load_recipe(recipe, set_ or [])
    if not as_json and is_model_name(recipe):
        print(choose_for(recipe).reason)
    _print_plan(settings, machine, as_json)


@app.command(short_help="Write report.html of a run.")
def report(run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="run folder, finished or not")]) -> None:
    """Writes report.html of a run: verdict, tables, plots and recipe on one page that needs no network."""
    require_run(run_dir)
    from .report import write_report

    print(write_report(run_dir))


@app.command(short_help="Check this machine.")
def doctor(as_json: JsonOption = False) -> None:
    """Checks this machine: versions, devices, memory, the attention op against its definition, shipped files.

    Exit code 1 means that a check failed; its line says what fixes it.
    """
    prepare_libraries(quiet=True)
    from .doctor import examine

    checks = examine()
    if as_json:
        print_json([vars(check) for check in checks])
    else:
        for check in checks:
            print(
                f"{'ok  ' if check.passed else 'FAIL'}  {check.name}: {check.found}"
                + (f"; {check.fix}" if check.fix else "")
            )
    failed = [check.name for check in checks if not check.passed]
    if failed:
        raise WorkError(f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}")


def main() -> None:
    """The console script: runs a command, turns errors into one line each and an exit code."""
    try:
        app()
    except InputError as error:
        _complain(error, 2)
    except WorkError as error:
        _complain(error, 1)


def _speaks() -> bool:
    """Whether this process prints: of those that a launcher started together, the first."""
    return os.environ.get("RANK", "0") == "0"


def _complain(error: Exception, code: int) -> None:
    if isinstance(error, InputError) and not _speaks():
        sys.exit(code)  # all found the same
    for line in str(error).splitlines():
        print(f"error: {line}", file=sys.stderr)
    sys.exit(code)
