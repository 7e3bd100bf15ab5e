"""The commands on pico models: what they print, write and return."""

import importlib.util
import io
import json
import resource
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cli_process import ROOT, in_a_process
from transformers import AutoTokenizer
from typer.testing import CliRunner

from nha_convert.app import app, main
from nha_convert.convert import load_student
from nha_convert.publish.export import export_model
from nha_convert.recipe import NHASettings, Recipe, dump_recipe, list_recipes, load_recipe

COMMANDS = ["run", "swap", "plan", "search", "recipes", "eval", "export", "verify", "report", "generate", "serve"]
COMMANDS += ["doctor", "bench"]


@dataclass
class Answer:
    returncode: int
    stdout: str
    stderr: str


def nha_convert(*arguments: Any, cwd: Path) -> Answer:
    """The same entry point in this process, where torch is imported already."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["nha-convert", *map(str, arguments)])
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Answer(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def swapped(pico_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("swapped")
    answer = in_a_process("swap", pico_llama, "out", "--set", "nha.window=[8, full]", "--json", cwd=place)
    assert answer.returncode == 0, answer.stderr
    report = json.loads(answer.stdout)
    assert (report["layers"], report["nha_layers"]) == (2, [0])
    return place / "out"


@pytest.fixture(scope="module")
def exported(pico_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export that carries its code."""
    student = load_student(pico_llama, NHASettings(window=8, slots=4))
    out = tmp_path_factory.mktemp("exported") / "out"
    return export_model(student, AutoTokenizer.from_pretrained(pico_llama), out, teacher_dir=pico_llama)


# ---- help ----------------------------------------------------------------------------------------
def test_help_lists_every_command_and_is_quick() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    answer = in_a_process("--help", cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert answer.returncode == 0
    listed = [line.split()[0] for line in answer.stdout.split("Commands:")[1].splitlines() if line.strip()]
    assert sorted(listed) == sorted(COMMANDS)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert seconds < 1.5  # processor time: about 0.3 s; importing torch alone takes longer


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(command: str) -> None:
    answer = CliRunner().invoke(app, [command, "--help"])
    assert answer.exit_code == 0
    assert "Usage:" in answer.output
    summary = answer.output.split("\n\n")[1].strip()
    assert len(summary) > 20


def test_version() -> None:
    answer = CliRunner().invoke(app, ["--version"])
    assert answer.output.startswith("nha-convert ")


# ---- recipes and plan ----------------------------------------------------------------------------
def test_recipes(tmp_path: Path) -> None:
    names = json.loads(nha_convert("recipes", "ls", "--json", cwd=tmp_path).stdout)
    assert sorted(names) == list_recipes()
    assert nha_convert("recipes", "cp", "demo", "mine.yaml", cwd=tmp_path).returncode == 0
    text = (tmp_path / "mine.yaml").read_text()
    assert nha_convert("recipes", "show", "demo", cwd=tmp_path).stdout == text
    assert "mine.yaml: valid" in nha_convert("recipes", "validate", "mine.yaml", "demo", cwd=tmp_path).stdout
    shown = nha_convert("recipes", "show", "mine.yaml", "--set", "nha.slots=7", cwd=tmp_path).stdout
    assert "slots: 7" in shown
    (tmp_path / "mine.yaml").write_text(text.replace("slots:", "slotz:"))
    answer = nha_convert("recipes", "validate", "demo", "mine.yaml", cwd=tmp_path)
    assert answer.returncode == 2
    assert answer.stdout == "demo: valid\n"
    assert "did you mean `nha.slots`?" in answer.stderr


def test_plan(pico_llama: Path, tmp_path: Path) -> None:
    arguments = ["run", pico_llama, "--dry-run", "--set", "evaluate.sequence_length=64"]
    for stage in ("align", "distill"):
        arguments += ["--set", f"stages.{stage}.sequence_length=256"]
    shown = nha_convert(*arguments, "--json", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    plan = json.loads(shown.stdout)
    assert plan["output"] == f"runs/{pico_llama.name}"
    again = nha_convert("plan", pico_llama, *arguments[3:], "--json", cwd=tmp_path)
    assert json.loads(again.stdout) == plan
    table = nha_convert(*arguments, cwd=tmp_path).stdout
    assert "peak memory" in table and "distill" in table
    assert (plan["gpu"]["name"], plan["gpu"]["count"]) == ("H100", 1) and "in all on H100" in table
    four = json.loads(nha_convert(*arguments, "--json", "--gpu", "mi300x", "--gpus", 4, cwd=tmp_path).stdout)
    assert (four["gpu"]["name"], four["gpu"]["count"]) == ("MI300X", 4)
    assert 0 < four["hours"] < plan["hours"] / 4
    assert [row["training_flops"] for row in four["stages"]] == [row["training_flops"] for row in plan["stages"]]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", "demo", "--gpu", "T4"], "--gpu: no GPU named 'T4' is known; allowed: A100-40GB, A100-80GB, H100,"),
        (["plan", "demo", "--gpus", 0], "--gpus: a number of at least 1 is needed, found 0"),
        (["plan", "demo", "--gpus", 64], "stages.0.batch_size: 4 rows cannot be dealt out to 64 processes"),
        (["run", "demo", "--dry-run", "--gpu", "T4"], "--gpu: no GPU named 'T4' is known"),
        (["run", "demo", "--gpu", "H100"], "--gpu and --gpus belong to --dry-run, which was not given"),
    ],
)
def test_gpus_that_are_none(tmp_path: Path, arguments: list[Any], words: str) -> None:
    answer = nha_convert(*arguments, cwd=tmp_path)
    assert answer.returncode == 2
    assert len(answer.stderr.splitlines()) == 1 and answer.stderr.startswith(f"error: {words}"), answer.stderr
    assert answer.stdout == "" and list(tmp_path.iterdir()) == []


# ---- run: what the command adds to the pipeline ---------------------------------------------------
RECIPE = """\
nha: {window: 8, slots: 4}
data: {sources: [{source: stdlib}]}
stages: [{kind: align, tokens: 256, sequence_length: 64, batch_size: 1}]
evaluate: {sequence_length: 64}
"""


@pytest.fixture
def run_folder(pico_llama: Path, tmp_path: Path) -> Path:
    """A finished run of mine.yaml, as its files say."""
    (tmp_path / "mine.yaml").write_text(f"model: {pico_llama}\n{RECIPE}")
    folder = tmp_path / "run"
    (folder / "export").mkdir(parents=True)
    (folder / "export" / "config.json").write_text("{}")
    (folder / "recipe.yaml").write_text(dump_recipe(load_recipe(str(tmp_path / "mine.yaml"))))
    rows = {"teacher": {"label": "teacher", "nll": 2.0}, "final": {"label": "final", "nll": 2.125}}
    (folder / "eval.json").write_text(json.dumps(rows))
    (folder / "verify.json").write_text('{"passed": true, "failures": []}')
    (folder / "report.html").touch()
    return folder


def test_a_finished_run_prints_its_table_again(run_folder: Path) -> None:
    for arguments in (["mine.yaml", "--out", "run"], ["run"]):
        answer = nha_convert("run", *arguments, "--resume", cwd=run_folder.parent)
        assert answer.returncode == 0, answer.stderr
        assert "2.1250" in answer.stdout and "run/export" in answer.stdout
    as_json = json.loads(nha_convert("run", "run", "--resume", "--json", cwd=run_folder.parent).stdout)
    assert as_json["evaluation"]["final"]["nll"] == 2.125
    again = nha_convert("run", "mine.yaml", "--out", "run", cwd=run_folder.parent)
    assert again.returncode == 2
    assert "go on with --resume" in again.stderr
    other = nha_convert("run", "run", "--resume", "--set", "nha.slots=8", cwd=run_folder.parent)
    assert other.returncode == 2
    assert "nha.slots is 4 in the folder, 8 now" in other.stderr


def test_a_failed_verification_is_exit_code_1(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run_folder / "verify.json").write_text('{"passed": false, "failures": ["logits differ by 0.5"]}')
    evaluation = json.loads((run_folder / "eval.json").read_text())
    monkeypatch.setattr("nha_convert.pipeline.run", lambda *_, **__: evaluation)  # it verifies, and fails, again
    answer = nha_convert("run", "run", "--resume", cwd=run_folder.parent)
    assert answer.returncode == 1
    assert "2.1250" in answer.stdout
    assert answer.stderr == "error: run/export: logits differ by 0.5\n"


def test_an_interrupted_run_says_how_to_go_on(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run_folder / "report.html").unlink()
    calls: list[tuple[Any, dict[str, Any]]] = []

    def interrupted(recipe: Recipe, out: Path, **options: Any) -> None:
        calls.append((out, options))
        raise KeyboardInterrupt

    monkeypatch.setattr("nha_convert.pipeline.run", interrupted)
    answer = nha_convert("run", "run", "--resume", "--quiet", cwd=run_folder.parent)
    assert answer.returncode == 1
    assert calls == [(Path("run"), {"resume": True, "quiet": True})]
    assert answer.stderr == "error: run: interrupted; what was done is kept, go on with: nha-convert run run --resume\n"


# ---- checkpoints ---------------------------------------------------------------------------------
def test_generate(swapped: Path, tmp_path: Path) -> None:
    arguments = ["generate", swapped, "--prompt", "the first", "--max-new-tokens", 12]
    answer = nha_convert(*arguments, "--json", cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    result = json.loads(answer.stdout)
    assert (result["prompt_tokens"], result["new_tokens"]) == (9, 12)
    streamed = nha_convert(*arguments, cwd=tmp_path)
    assert streamed.stdout.strip() == result["text"].strip()
    sampled = [
        json.loads(nha_convert(*arguments, "--temperature", 1, "--seed", seed, "--json", cwd=tmp_path).stdout)["text"]
        for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


def test_generate_with_other_windows(swapped: Path, pico_llama: Path, tmp_path: Path) -> None:
    """Full windows at inference: the teacher's own text."""
    arguments = ["--prompt", "the first", "--max-new-tokens", 12, "--json"]
    answers = [
        nha_convert("generate", folder, *arguments, *changed, cwd=tmp_path)
        for folder, changed in (
            (swapped, []),
            (swapped, ["--set", "nha.window=full"]),
            (pico_llama, []),
            (swapped, ["--set", "nha.full_attention_layers=[0]"]),
        )
    ]
    assert [answer.returncode for answer in answers] == [0] * 4, answers[1].stderr
    kept, full, teacher, one = (json.loads(answer.stdout) for answer in answers)
    assert full["text"] == teacher["text"] != kept["text"]
    assert "windows" not in teacher and kept["windows"][1] is None  # layer 1 was never converted
    assert full["windows"] == one["windows"] == ["full", None] and one["text"] == full["text"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--device", "tpu9"], "one of auto, cpu, mps, cuda or cuda:N is needed"),
        (["--set", "nha.slots=3"], "changes `nha.window` and `nha.full_attention_layers` alone"),
        (["--set", "nha.window=-3"], "--set nha.window=-3: nha.window"),
        (["--set", "nha.window=[4, 4, 4]"], "the model has 2 layers"),
        (["--set", "nha.full_attention_layers=[7]"], "found [7]"),
    ],
)
def test_generate_refuses(swapped: Path, tmp_path: Path, options: list[str], words: str) -> None:
    answer = nha_convert("generate", swapped, "--prompt", "x", *options, cwd=tmp_path)
    assert answer.returncode == 2
    assert words in answer.stderr and answer.stderr.startswith("error: ")


def test_verify(exported: Path, pico_llama: Path, tmp_path: Path) -> None:
    answer = nha_convert("verify", exported, "--teacher", pico_llama, "--json", cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["passed"]


def test_verify_fails_with_exit_code_1(exported: Path, tmp_path: Path, pico_models: dict[str, Path]) -> None:
    """Weights of another teacher: the work of checking was done, and the answer is no."""
    answer = nha_convert("verify", exported, "--teacher", pico_models["llama_tied_rope"], cwd=tmp_path)
    assert answer.returncode == 1, answer.stderr
    assert all(line.startswith("error: ") for line in answer.stderr.splitlines())
    assert "failed" in answer.stdout


def test_eval(swapped: Path, pico_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("All that glitters is not gold; " * 40)
    arguments = ["eval", swapped, "--text", "text.txt", "--no-recall", "--json", "numbers.json"]
    settings = ["--set", "evaluate.sequence_length=64", "--set", "evaluate.tokens=512"]
    answer = nha_convert(*arguments, *settings, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["final"]["nll"] > numbers["final"]["kl"] >= 0
    assert numbers["final"]["nll_teacher"] == pytest.approx(numbers["teacher"]["nll"], abs=1e-5)
    assert {"window_only", "memory_only", "no_attention"} <= numbers.keys()
    assert "window only" in answer.stdout
    against = nha_convert(*arguments, *settings, "--teacher", pico_llama, "--quiet", cwd=tmp_path)
    assert against.returncode == 0, against.stderr
    assert against.stdout == ""
    again = json.loads((tmp_path / "numbers.json").read_text())
    assert again["final"]["kl"] == pytest.approx(numbers["final"]["kl"], abs=1e-5)
    too_long = nha_convert("eval", swapped, "--no-recall", cwd=tmp_path)
    assert too_long.returncode == 2
    assert "use --set evaluate.sequence_length=512" in too_long.stderr


def test_eval_saves_into_a_run_alone(swapped: Path, tmp_path: Path) -> None:
    answer = nha_convert("eval", swapped, "--save", cwd=tmp_path)
    assert answer.returncode == 2 and "no finished run folder (the one above `export`)" in answer.stderr


def test_eval_refuses_tasks_before_it_loads_anything(swapped: Path, tmp_path: Path) -> None:
    empty = nha_convert("eval", swapped, "--tasks", "arc_easy,", "--json", "n.json", cwd=tmp_path)
    assert empty.returncode == 2 and "names of tasks with commas between are needed" in empty.stderr
    unknown = nha_convert("eval", swapped, "--set", "evaluate.tasks=[needles]", "--json", "n.json", cwd=tmp_path)
    assert unknown.returncode == 2 and "did you mean `needle`" in unknown.stderr
    if importlib.util.find_spec("lm_eval") is None:
        missing = nha_convert("eval", swapped, "--tasks", "arc_easy", "--json", "n.json", cwd=tmp_path)
        assert missing.returncode == 2 and "pip install 'nha-convert[eval]'" in missing.stderr
    assert not (tmp_path / "n.json").exists()


def test_eval_of_an_ordinary_model(pico_llama: Path, tmp_path: Path) -> None:
    settings = ["--set", "evaluate.sequence_length=64", "--set", "evaluate.tokens=256"]
    answer = nha_convert("eval", pico_llama, "--no-recall", "--json", "n.json", *settings, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert set(json.loads((tmp_path / "n.json").read_text())) == {"teacher", "settings"}


# ---- doctor --------------------------------------------------------------------------------------
def test_doctor(tmp_path: Path) -> None:
    answer = nha_convert("doctor", "--json", cwd=tmp_path)
    checks = {check["name"]: check for check in json.loads(answer.stdout)}
    assert {"python", "torch", "transformers", "devices", "attention op", "recipes", "embedded model"} <= checks.keys()
    assert checks["attention op"]["passed"] and checks["recipes"]["passed"]
    failed = [name for name, check in checks.items() if not check["passed"]]
    assert answer.returncode == (1 if failed else 0)
    assert all(checks[name]["fix"] for name in failed)
