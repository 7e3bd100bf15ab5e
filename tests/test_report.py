"""report.html: a finished run, an unfinished one, a folder that is no run."""

import html.parser
import json
import re
from pathlib import Path
from typing import Any

import pytest

from nha_convert.errors import InputError
from nha_convert.report import write_report

RECIPE = "model: embedded\noutput: runs/x  # <not a tag> & 'quotes'\n"
BUCKETS = {"0-16": 4.0, "16-32": 3.0, "32-64": 2.5}


def row(label: str, nll: float, exact: float | None = None, **more: Any) -> dict[str, Any]:
    """One row of eval.json."""
    buckets = {key: nll - 3 + value for key, value in BUCKETS.items()}
    recall = (
        {}
        if exact is None
        else {
            distance: {"exact_match": exact, "low": exact - 0.05, "high": exact + 0.04, "prompts": 32, "span": 256}
            for distance in ("64", "128")
        }
    )
    return {"label": label, "nll": nll, "nll_buckets": buckets, "recall": recall} | more


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return make_run(tmp_path)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report of a finished run, drawn once."""
    path = write_report(make_run(tmp_path_factory.mktemp("run")))
    assert path.name == "report.html"
    assert not path.with_name("report.html.tmp").exists()
    return path.read_text(encoding="utf-8")


def make_run(tmp_path: Path) -> Path:
    """A finished run's folder, in the forms that the pipeline and the trainer write."""
    mass = [{"layer": layer, "mean": 0.1 * layer + 0.07, "buckets": {}} for layer in (0, 1, 3)]
    evaluation = {
        "teacher": row("teacher", 2.5432, 0.91, recall_left_out={"1024": "no room in the trained context"}),
        "window_only": row("window_only", 3.1, 0.05, kl=0.7, top1=0.5),
        "swapped": row("swapped", 5.4321, 0.06, kl=2.9, top1=0.11, slot_mass=mass),
        "aligned": row("aligned", 2.7, 0.72, kl=0.21, top1=0.81, slot_mass=mass),
        "final": row("final", 2.5687, 0.88, kl=0.0123, top1=0.934, slot_mass=mass),
        "memory_recovery": {"swapped": -4.19, "aligned": 0.7182, "final": 0.9542},
        "seconds": 432.0,
    }
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "eval.json").write_text(json.dumps(evaluation))
    (tmp_path / "verify.json").write_text(json.dumps({"passed": True, "max_logit_difference": 1.5e-6}))
    rows = [
        {
            "stage": "01-align",
            "step": step,
            "tokens": 4096 * step,
            "loss": 1 / step,
            "align/layer_00": 0.9 / step,
            "align/layer_01": 0.8 / step,
        }
        for step in (1, 2, 3, 10)
    ] + [{"stage": "02-distill", "step": step, "tokens": 4096 * step, "loss": 0.1 / step} for step in (1, 2, 3)]
    lines = "".join(json.dumps(line) + "\n" for line in rows)
    (tmp_path / "metrics.jsonl").write_text(lines + '{"stage": "02-dist')  # killed while writing
    return tmp_path


class Resources(html.parser.HTMLParser):
    """Collects tags and every attribute through which a page could load something."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_finished_run(page: str) -> None:
    parser = Resources()
    parser.feed(page)
    text = re.sub(r"\s+", " ", " ".join(parser.text))
    for number in ("2.5687", "2.5432", "5.4321", "0.0123", "0.934", "0.954", "0.718", "+1.00 %", "0.88", "7.2 minutes"):
        assert number in text, number
    assert "The student's NLL is 2.5687, 1.00 % above the teacher's 2.5432." in text
    assert text.index("The student's NLL") < text.index("memory recovery") < text.index("recipe.yaml, resolved")
    assert "Recall at 1024 tokens left out: no room in the trained context." in text
    assert "<not a tag> & 'quotes'" in " ".join(parser.text)
    # two losses, NLL, recall, alignment, slots
    assert parser.tags.count("svg") == 6
    assert "not measured</p>" not in page


def test_self_contained(page: str) -> None:
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\((?!#)", page)
    parser = Resources()
    parser.feed(page)
    assert all(link.startswith("#") for link in parser.links)
    assert not {"script", "link", "img", "iframe"} & set(parser.tags)


def test_light_dark_and_phone(page: str) -> None:
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page
    style, body = page.split("</style>", 1)
    used = set(re.findall(r"var\((--[a-z-]+)\)", page))
    light, dark = style.split("@media", 1)
    for variable in used:
        assert f"{variable}:" in light and f"{variable}:" in dark, variable
    # plots take every colour from the page: a fixed one would vanish in one of the schemes
    assert not re.findall(r"#0[123]00\d\d|(?:fill|stroke): ?(?:black|#(?!fff)[0-9a-f]{6})", body)


def test_ids_of_plots_do_not_collide(page: str) -> None:
    defined = [re.findall(r'<(?:clipPath|path) id="([^"]+)"', svg) for svg in page.split("<svg")[1:]]
    shared = [
        name
        for index, names in enumerate(defined)
        for other in defined[index + 1 :]
        for name in set(names) & set(other)
    ]
    assert shared == []


def test_unfinished_run_shows_what_there_is(run_dir: Path) -> None:
    for name in ("eval.json", "verify.json", "metrics.jsonl"):
        (run_dir / name).unlink()
    (run_dir / "evaluation").mkdir()
    (run_dir / "evaluation" / "teacher.json").write_text(json.dumps(row("teacher", 2.5432)))
    page = write_report(run_dir).read_text()
    assert "The run is not finished: the final model is not measured." in page
    assert "Memory recovery is not measured." in page
    assert "The exported model is not verified." in page
    assert page.count("<p>not measured</p>") == 4  # recall, loss, alignment, slots; NLL by position is there
    assert "<td>2.5432</td>" in page
    assert re.search(r'<tr class="final"><td>final</td>(<td>–</td>)+</tr>', page)


def test_measured_but_not_summarised(run_dir: Path) -> None:
    evaluation = json.loads((run_dir / "eval.json").read_text())
    (run_dir / "eval.json").unlink()
    (run_dir / "evaluation").mkdir()
    branches = {"memory_only": row("memory_only", 6.1234)}
    final = evaluation["final"] | {"memory_recovery": 0.8765, "branches": branches}
    for name, content in (("final", final), ("teacher", evaluation["teacher"])):
        (run_dir / "evaluation" / f"{name}.json").write_text(json.dumps(content))
    page = write_report(run_dir).read_text()
    assert "<td>6.1234</td>" in page and "<td>0.876</td>" in page and "0.876 final" in page


def test_failed_verification_is_said(run_dir: Path) -> None:
    (run_dir / "verify.json").write_text(json.dumps({"passed": False}))
    assert "The exported model failed its verification." in write_report(run_dir).read_text()


def test_not_a_run_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no recipe.yaml"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []
