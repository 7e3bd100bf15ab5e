"""The commands that work on a finished checkpoint: eval, export, verify, generate, serve.

As in `app`: what each takes and prints; heavy imports stand inside the commands.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .command_options import (
    JsonOption,
    QuietOption,
    SetOption,
    checkpoint_folder,
    prepare_libraries,
    print_json,
    print_rich,
    require_passed,
)
from .errors import InputError

checkpoint_app = typer.Typer(rich_markup_mode=None)


@checkpoint_app.command("eval", short_help="Measure a checkpoint against its teacher.")
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
    tasks: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="tasks of lm-evaluation-harness, with commas between; nha_recall is ours"),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the numbers here")] = None,
    save: Annotated[
        bool, typer.Option("--save", help="of a run folder: add tasks and layers to its eval.json and report")
    ] = False,
    quiet: QuietOption = False,
) -> None:
    """Measures a checkpoint: NLL by position, KL and top-1 agreement, each branch alone, recall by generation.

    \b
    nha-convert eval runs/demo/export
    nha-convert eval swapped/ --teacher Qwen/Qwen3-0.6B --text book.txt --json numbers.json
    nha-convert eval runs/demo --set evaluate.sequence_length=512 --set evaluate.tokens=16k --no-recall
    nha-convert eval runs/demo --set nha.window=256
    nha-convert eval runs/demo --set 'evaluate.tasks=[mqar,needle]' --set evaluate.layer_ablation=true --save
    nha-convert eval my-model/ --no-recall --tasks arc_easy,hellaswag

    Text is the held-out mix of the checkpoint's own recipe (what swap wrote has none: the held-out part of this
    machine's Python standard library) unless --text names another; settings are those under `evaluate.`, and the
    windows to measure with (nha.window, nha.full_attention_layers). --tasks runs the harness on the checkpoint and its
    teacher; it needs `pip install 'nha-convert[eval]'`. --save adds what a run did not ask (recall tasks, each layer
    alone, the harness) to its own numbers.
    """
    from .files import write_json

    names, folder, overrides = _task_names(tasks), checkpoint_folder(checkpoint), set_ or []
    if json_file is not None and json_file.is_dir():
        raise InputError(f"--json {json_file}: is a folder; name a file")
    if save:
        given = {"--text": text is not None, "--teacher": teacher is not None, "--no-recall": not recall}
        others = [option for option, is_given in given.items() if is_given]
        evaluation, said = _add_to_run(checkpoint.expanduser(), folder, overrides, names, others, quiet)
    else:
        evaluation, said = _measure(folder, overrides, names, teacher, text, recall, quiet), ""
    if json_file is not None:
        write_json(json_file, evaluation)
    if not quiet:
        from .evaluate.suite import summary_table

        print_rich(summary_table(evaluation))
        print(said, end="")


def _task_names(tasks: str | None) -> list[str]:
    names = [name.strip() for name in tasks.split(",")] if tasks is not None else []
    if "" in names:
        raise InputError(
            f"--tasks {tasks!r}: names of tasks with commas between are needed, such as arc_easy,hellaswag"
        )
    return names


def _measure(
    folder: Path,
    overrides: list[str],
    tasks: list[str],
    teacher: str | None,
    text: str | None,
    recall: bool,
    quiet: bool,
) -> dict[str, Any]:
    """A checkpoint by itself, in other windows where some are named."""
    from .recipe import evaluate_settings, window_settings

    of_windows = [one for one in overrides if one.removeprefix("~").startswith("nha.")]
    windows = window_settings(of_windows, "eval")
    settings = evaluate_settings(folder, [one for one in overrides if one not in of_windows])
    prepare_libraries(quiet)
    from .evaluate_checkpoint import evaluate_checkpoint

    options: dict[str, Any] = {"teacher": teacher, "text": text, "windows": windows, "tasks": tasks}
    return evaluate_checkpoint(folder, settings=settings, with_recall=recall, quiet=quiet, **options)


def _add_to_run(
    run: Path, folder: Path, overrides: list[str], tasks: list[str], others: list[str], quiet: bool
) -> tuple[dict[str, Any], str]:
    """What a run lacks, measured on its own text against its own teacher and added; and a line that says so."""
    from .recipe import evaluate_settings
    from .report import write_report
    from .saved_evaluation import EVALUATION, check_save, save_evaluation, settings_to_save

    parts = check_save(run, overrides, harness=bool(tasks), others=others)
    settings = settings_to_save(evaluate_settings(run, overrides), parts)
    prepare_libraries(quiet)
    from .evaluate_checkpoint import evaluate_checkpoint

    options: dict[str, Any] = {"tasks": tasks, "recipe": run / "recipe.yaml"}
    evaluation = evaluate_checkpoint(folder, settings=settings, with_recall="tasks" in parts, quiet=quiet, **options)
    save_evaluation(run, evaluation, parts)
    page = write_report(run)
    return evaluation, f"\nadded to {run / EVALUATION} and {page}: {', '.join(parts)}\n"


@checkpoint_app.command(short_help="Write a model to a folder, or send it to the Hub.")
def export(
    source: Annotated[Path, typer.Argument(metavar="RUN|CKPT", help="finished run folder, or NHA checkpoint folder")],
    out: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="folder to write, new or empty; may be left out with --push")
    ] = None,
    push: Annotated[str | None, typer.Option(metavar="USER/NAME", help="send it to this repository of the Hub")] = None,
    private: Annotated[bool, typer.Option("--private", help="make the repository a private one")] = False,
    revision: Annotated[str | None, typer.Option(metavar="BRANCH", help="branch to push to; main if not given")] = None,
    teacher: Annotated[
        str | None, typer.Option(metavar="MODEL", help="what a checkpoint was made from: named in the card, compared")
    ] = None,
    max_shard_size: Annotated[str | None, typer.Option(metavar="SIZE", help="such as 2GB; 5GB if not given")] = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Writes a run's model, or what swap wrote, as a self-contained folder that plain transformers loads.

    \b
    nha-convert export runs/demo my-model/
    nha-convert export swapped/ my-model/ --teacher Qwen/Qwen3-0.6B --max-shard-size 2GB
    nha-convert export runs/demo my-model/ --push me/my-model --private
    nha-convert export my-model/ --push me/my-model

    The last form sends an earlier export as it is. Logging in: `hf auth login`.
    """
    from .publish.export_request import export_request

    options = {"teacher": teacher, "max_shard_size": max_shard_size}
    request = export_request(source, out, push=push, private=private, revision=revision, **options)
    prepare_libraries(quiet)
    from .publish.hub import check_target, push_folder

    if push is not None:
        check_target(push)
    folder = request.out or request.source
    if request.out is not None:
        from .publish.export import export_checkpoint, export_run

        if request.is_run:
            export_run(request.source, request.out, max_shard_size=max_shard_size, quiet=quiet)
        else:
            export_checkpoint(request.source, request.out, quiet=quiet, **options)
    address = None if push is None else push_folder(folder, push, private=private, revision=revision)
    if as_json:
        print_json({"folder": str(folder), "pushed": address})
    elif not quiet:
        print("\n".join([str(folder), *([address] if address else [])]))


@checkpoint_app.command(short_help="Reload a checkpoint alone and check it.")
def verify(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="checkpoint folder, or a run folder")],
    teacher: Annotated[str | None, typer.Option(metavar="MODEL", help="also compare untouched tensors with it")] = None,
    trust_code: Annotated[
        bool, typer.Option("--trust-code", help="run the checkpoint's code even if it is not this version's own")
    ] = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Reloads a checkpoint in a fresh process without this package and checks that it computes the same.

    \b
    nha-convert verify runs/demo
    nha-convert verify my-model/ --teacher Qwen/Qwen3-0.6B --json

    Compares logits with the run's own, padded with unpadded rows, cached with uncached decoding, files with their
    recorded hashes. The code in the folder is run if it is byte for byte what this version writes, or with
    --trust-code. Exit code 1 means that a check failed.
    """
    folder = checkpoint_folder(checkpoint)
    prepare_libraries(quiet)
    from .publish.verify import verify_checkpoint

    result = verify_checkpoint(folder, teacher, trust_code=trust_code, quiet=quiet)
    if as_json:
        print_json(result)
    elif not quiet:
        for key, value in result.items():
            if key not in ("failures", "passed"):
                print(f"{key}: {value}")
        print("passed" if result["passed"] else "failed")
    require_passed(result, folder)


@checkpoint_app.command(short_help="Continue a prompt.")
def generate(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="checkpoint folder, or a run folder")],
    prompt: Annotated[str, typer.Option(help="text to continue; `-` reads it from stdin")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="tokens to write at most")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0, help="sample among this share of the mass")] = 1.0,
    seed: Annotated[int, typer.Option(help="of the sampling")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, mps, cuda or cuda:N")] = "auto",
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Continues a prompt with a checkpoint; the text appears as it is made.

    \b
    nha-convert generate runs/demo --prompt "def main("
    cat notes.txt | nha-convert generate my-model/ --prompt - --temperature 0.8 --max-new-tokens 200
    nha-convert generate my-model/ --prompt "def main(" --set nha.window=full

    --set changes the windows (nha.window, nha.full_attention_layers) without retraining: smaller, larger or full.
    """
    from .recipe import window_settings

    windows = window_settings(set_ or [], "generate")
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
        windows=windows,
    )
    if as_json:
        print_json(result)


@checkpoint_app.command(short_help="Serve a checkpoint over HTTP, OpenAI-compatible.")
def serve(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="checkpoint folder, or a run folder")],
    host: Annotated[str, typer.Option(help="address to listen on; 0.0.0.0 is every one of this machine")] = "localhost",
    port: Annotated[int, typer.Option(min=1, max=65535, help="port to listen on")] = 8000,
    device: Annotated[str, typer.Option(help="auto, cpu, mps, cuda or cuda:N")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16")] = "auto",
) -> None:
    """Serves a checkpoint with transformers' own server, until interrupted; needs `pip install 'nha-convert[serve]'`.

    \b
    nha-convert serve my-model/ --port 8000
    transformers chat my-model http://localhost:8000/v1

    Answers /v1/chat/completions, /v1/completions, /v1/responses and /v1/models; the model's name in requests is the
    folder as given here. Requests are answered one after the other: continuous batching cannot hold NHA states.
    """
    folder = checkpoint_folder(checkpoint)
    prepare_libraries(quiet=False)
    from .serve import serve_checkpoint

    serve_checkpoint(folder, host=host, port=port, device=device, dtype=dtype)
