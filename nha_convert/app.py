"""The command line: what each command takes and prints. The work is done in the modules it calls.

Heavy imports stand inside the commands, so that `--help` and refusals answer at once.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from . import __version__
from .command_options import (
    JsonOption,
    QuietOption,
    RecipeArgument,
    SetOption,
    checkpoint_folder,
    prepare_libraries,
    print_json,
    print_rich,
    require_passed,
    require_run,
)
from .errors import InputError, WorkError
from .recipes_app import recipes_app

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
    from .plan import make_plan, render_plan
    from .preflight import check_inputs, finished
    from .recipe import load_recipe

    settings = load_recipe(recipe, set_ or [])
    if out is not None:
        settings.output = str(out)
    folder = Path(settings.output).expanduser()
    check_inputs(settings, folder, resume)
    if dry_run:
        plan_ = make_plan(settings)
        print_json(plan_) if as_json else print_rich(render_plan(plan_))
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
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Converts the structure alone: new gate tensors beside the untouched weights, nothing trained.

    \b
    nha-convert swap Qwen/Qwen3-0.6B swapped/ --set nha.window=64 --set nha.full_attention_layers=every:4

    Settings are those under `nha.` and `seed`. The result carries its code and loads with plain transformers.
    Untrained, its memory is of little use: `nha-convert run` trains it.
    """
    from .model_files import check_safetensors, local_folder
    from .plan import model_dimensions
    from .preflight import check_new_folder
    from .recipe import swap_settings

    nha, seed = swap_settings(set_ or [])
    nha.windows(model_dimensions(model).layers)
    folder = local_folder(model)
    if folder is not None:
        check_safetensors(folder)
    check_new_folder(out)
    prepare_libraries(quiet)
    from .convert import swap_checkpoint

    report_ = swap_checkpoint(model, out, nha, seed=seed, quiet=quiet)
    if as_json:
        print_json(report_)
    elif not quiet:
        from .plan import count

        print(
            f"{report_['out']}: {len(report_['nha_layers'])} of {report_['layers']} layers are NHA, "
            f"{count(report_['new_parameters'])} new parameters"
        )


@app.command(short_help="What a recipe changes, trains and needs.")
def plan(recipe: RecipeArgument, set_: SetOption = None, as_json: JsonOption = False) -> None:
    """Says what a recipe will change, train and need, from config.json alone; loads and writes nothing.

    \b
    nha-convert plan demo
    nha-convert plan Qwen/Qwen3-0.6B --set nha.full_attention_layers=every:8 --json
    """
    from .plan import make_plan, render_plan
    from .recipe import load_recipe

    plan_ = make_plan(load_recipe(recipe, set_ or []))
    print_json(plan_) if as_json else print_rich(render_plan(plan_))


@app.command("eval", short_help="Measure a checkpoint against its teacher.")
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="checkpoint folder, or a run folder")],
    teacher: Annotated[
        str | None, typer.Option(metavar="MODEL", help="model to compare with; the recipe's own if not given")
    ] = None,
    text: Annotated[
        str | None, typer.Option(metavar="FILE", help="text to measure on: a file, glob or folder of .txt")
    ] = None,
    set_: SetOption = None,
    recall: Annotated[bool, typer.Option(help="ask for values stated far back")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the numbers here")] = None,
    quiet: QuietOption = False,
) -> None:
    """Measures a checkpoint: NLL by position, KL and top-1 agreement, each branch alone, recall by generation.

    \b
    nha-convert eval runs/demo/export
    nha-convert eval swapped/ --teacher Qwen/Qwen3-0.6B --text book.txt --json numbers.json
    nha-convert eval runs/demo --set evaluate.sequence_length=512 --set evaluate.tokens=16k --no-recall

    Text is the held-out mix of the checkpoint's own recipe (what swap wrote has none: the held-out part of this
    machine's Python standard library) unless --text names another; settings are those under `evaluate.`.
    """
    from .files import write_json
    from .recipe import evaluate_settings

    folder = checkpoint_folder(checkpoint)
    if json_file is not None and json_file.is_dir():
        raise InputError(f"--json {json_file}: is a folder; name a file")
    settings = evaluate_settings(folder, set_ or [])
    prepare_libraries(quiet)
    from .evaluate.suite import summary_table
    from .evaluate_checkpoint import evaluate_checkpoint

    evaluation = evaluate_checkpoint(
        folder, teacher=teacher, text=text, settings=settings, with_recall=recall, quiet=quiet
    )
    if json_file is not None:
        write_json(json_file, evaluation)
    if not quiet:
        print_rich(summary_table(evaluation))


@app.command(short_help="Write a run's model to a folder.")
def export(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="folder of a finished run")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="folder to write; must be new or empty")],
    quiet: QuietOption = False,
) -> None:
    """Writes a run's model again: a self-contained folder that plain transformers loads.

    \b
    nha-convert export runs/demo my-model/
    """
    from .preflight import check_new_folder

    require_run(run_dir)
    check_new_folder(out)
    prepare_libraries(quiet)
    from .export import export_run

    path = export_run(run_dir, out)
    if not quiet:
        print(path)


@app.command(short_help="Reload a checkpoint alone and check it.")
def verify(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="checkpoint folder, or a run folder")],
    teacher: Annotated[str | None, typer.Option(metavar="MODEL", help="also compare untouched tensors with it")] = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Reloads a checkpoint in a fresh process without this package and checks that it computes the same.

    \b
    nha-convert verify runs/demo
    nha-convert verify my-model/ --teacher Qwen/Qwen3-0.6B --json

    Compares logits with the run's own, cached with uncached decoding, files with their recorded hashes. Exit code 1
    means that a check failed.
    """
    folder = checkpoint_folder(checkpoint)
    prepare_libraries(quiet)
    from .verify import verify_checkpoint

    result = verify_checkpoint(folder, teacher, quiet=quiet)
    if as_json:
        print_json(result)
    elif not quiet:
        for key, value in result.items():
            if key not in ("failures", "passed"):
                print(f"{key}: {value}")
        print("passed" if result["passed"] else "failed")
    require_passed(result, folder)


@app.command(short_help="Write report.html of a run.")
def report(run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="run folder, finished or not")]) -> None:
    """Writes report.html of a run: table, plots and recipe on one page that needs no network."""
    require_run(run_dir)
    from .report import write_report

    print(write_report(run_dir))


@app.command(short_help="Continue a prompt.")
def generate(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="checkpoint folder, or a run folder")],
    prompt: Annotated[str, typer.Option(help="text to continue; `-` reads it from stdin")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="tokens to write at most")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0, help="sample among this share of the mass")] = 1.0,
    seed: Annotated[int, typer.Option(help="of the sampling")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, mps, cuda or cuda:N")] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Continues a prompt with a checkpoint; the text appears as it is made.

    \b
    nha-convert generate runs/demo --prompt "def main("
    cat notes.txt | nha-convert generate my-model/ --prompt - --temperature 0.8 --max-new-tokens 200
    """
    folder = checkpoint_folder(checkpoint)
    if prompt == "-":
        prompt = sys.stdin.read()
    prepare_libraries(quiet=True)
    from .generate import generate_text

    result = generate_text(
        folder,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        device=device,
        stream=not as_json,
    )
    if as_json:
        print_json(result)


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


def _complain(error: Exception, code: int) -> None:
    for line in str(error).splitlines():
        print(f"error: {line}", file=sys.stderr)
    sys.exit(code)
