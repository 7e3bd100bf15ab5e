"""report.html: a finished run, an unfinished one, a folder that is no run."""

import html.parser
import json
import re
from pathlib import Path
from typing import Any

import pytest

from nha_convert.errors import InputError
from nha_convert.report import write_report

RECIPE = "model: embedded\noutput: runs/x  # <not a tag> & 'quotes'\nseed: 11\n"
BUCKETS = {"0-16": 4.0, "16-32": 3.0, "32-64": 2.5}
SECTIONS = [
    *("verdict", "measured", "training", "distance", "memory", "cost"),
    *("layers", "branches", "recipe", "provenance"),
]
VOID = {"meta", "br"}


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
    intervals = {"bootstrap": {"windows": 8, "draws": 1000, "seed": 3}, "nll": [nll - 0.25, nll + 0.125]}
    if "kl" in more:
        more = {"kl_buckets": dict.fromkeys(BUCKETS, more["kl"]), "top1_buckets": dict.fromkeys(BUCKETS, 0.9)} | more
    return {"label": label, "nll": nll, "nll_buckets": buckets, "recall": recall, "intervals": intervals} | more


def usage(layers: list[int]) -> dict[str, Any]:
    """`slot_usage` of 4 query heads and 2 key heads."""
    of_queries = [[0.1 * (layer + 1) / (head + 1) for head in range(4)] for layer in layers]
    of_keys = [[20.0 * (layer + 1), 30.0 * (layer + 1)] for layer in layers]
    horizons = {f"horizon_{name}": of_keys for name in ("low", "median", "high")}
    return {
        "layers": layers,
        "slot_mass": of_queries,
        "effective_slots": [[10.0] * 4] * len(layers),
        "write_rate": [[0.02, 0.04]] * len(layers),
        **horizons,
    }


def bench() -> dict[str, Any]:
    def spread(value: float) -> dict[str, Any]:
        return {"median": value, "low": 0.9 * value, "high": 1.2 * value, "confidence": 0.96, "runs": 20}

    def line(key: str, tokens: int) -> dict[str, Any]:
        times = {"teacher": spread(tokens * 1e-6), "student": spread(4e-4), "ratio": spread(tokens / 400)}
        return {key: tokens, **times, "cache_bytes": {"teacher": 4096 * tokens, "student": 1024 * tokens}}

    stamp = {"command": "nha-convert bench x", "date": "2026-01-01", "commit": None, "device_name": "2 cores of Z"}
    return {
        "teacher": "the student's own weights in teacher mode",
        "decode": [line("context", tokens) for tokens in (1024, 32768)],
        "prefill": [line("tokens", 1024)],
        "left_out": [{"what": "prefill", "context": 4096, "reason": "would take about 99 s"}],
        "max_position_embeddings": 2048,
        "environment": stamp | {"device": "cpu", "dtype": "float32", "threads": 1},
    }


def make_run(tmp_path: Path) -> Path:
    """A finished run's folder, in the forms that the pipeline and the trainer write."""
    mass = [{"layer": layer, "mean": 0.1 * layer + 0.07, "buckets": dict(BUCKETS)} for layer in (0, 2)]
    pairs = [
        {"distance": 64, "pairs": 4, "exact_match": 0.75, "low": 0.5, "high": 0.9, "prompts": 16, "span": 90},
        {"distance": 256, "pairs": 4, "left_out": "no room"},
    ]
    gains = [{"layer": layer, "nll": 3.0, "nll_gain": 0.02, "interval": [0.0111, 0.0333]} for layer in (0, 2)]
    evaluation = {
        "teacher": row("teacher", 2.5432, 0.91, recall_left_out={"1024": "no room in context"}, tasks={"mqar": pairs}),
        "window_only": row("window_only", 3.1, 0.05, kl=0.7, top1=0.5),
        "memory_only": row("memory_only", 5.1, kl=0.9, top1=0.3),
        "no_attention": row("no_attention", 7.1, kl=1.9, top1=0.1),
        "swapped": row("swapped", 5.4321, 0.06, kl=2.9, top1=0.11, slot_mass=mass),
        "aligned": row("aligned", 2.7, 0.72, kl=0.21, top1=0.81, slot_mass=mass),
        "final": row("final", 2.5687, 0.88, kl=0.0123, top1=0.934, slot_mass=mass)
        | {"slot_usage": usage([0, 2]), "layer_ablation": gains, "tasks": {"mqar": pairs}},
        "memory_recovery": {"swapped": -4.19, "aligned": 0.7182, "final": 0.9542},
        "seconds": 432.0,
    }
    plan = [{"layer": layer, "attention": "nha", "window": 64, "slots": 32} for layer in range(3)]
    plan[1] = {"layer": 1, "attention": "full", "window": None, "slots": None}
    made = {"command": "nha-convert run x", "date": "2026-01-01", "commit": "abc123", "machine": "2 cores of Z"}
    files = {
        "eval.json": evaluation,
        "verify.json": {"passed": True, "max_logit_difference": 1.5e-6},
        "bench.json": bench(),
        "plan.json": {"layers": plan},
        "run.json": made | {"versions": {"nha-convert": "0.1", "torch": "2.99"}},
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    rows: list[dict[str, Any]] = [
        {
            "stage": "01-align",
            "step": step,
            "tokens": 4096 * step,
            "loss": 1 / step,
            "align/layer_00": 0.9 / step,
            "align/layer_02": 0.8 / step,
        }
        for step in range(1, 41)
    ] + [{"stage": "02-distill", "step": step, "tokens": 4096 * step, "loss": 0.1 / step} for step in (1, 2, 3)]
    lines = "".join(json.dumps(line) + "\n" for line in rows)
    (tmp_path / "metrics.jsonl").write_text(lines + '{"stage": "02-dist')  # killed while writing
    return tmp_path


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return make_run(tmp_path)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report of a finished run, drawn once."""
    path = write_report(make_run(tmp_path_factory.mktemp("run")))
    assert path.name == "report.html"
    assert not [one.name for one in path.parent.iterdir() if "partial" in one.name]
    return path.read_text(encoding="utf-8")


class Page(html.parser.HTMLParser):
    """Tags, texts, attributes through which a page could load something, and tags that are not closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.unbalanced: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.append((tag, dict(attrs)))
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")]

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))


def test_every_number_is_there(page: str) -> None:
    text = Page(page).text
    for number in ("2.5687", "2.5432", "5.4321", "0.0123", "0.934", "0.954", "0.718", "+1.00 %", "0.88", "7.2 minutes"):
        assert number in text, number
    assert "[2.319, 2.694]" in text  # the final NLL's interval
    assert "[0.83, 0.92]" in text  # recall
    assert "[0.0111, 0.0333]" in text  # a layer's own gain
    assert "bootstrap over 8 windows, 1000 draws, seed 3" in text
    assert "Recall at 1024 tokens left out: no room in context." in text
    assert "Left out: prefill at 4,096: would take about 99 s." in text
    for fact in ("nha-convert run x", "abc123", "torch 2.99", "seed of the run 11", "2 cores of Z"):
        assert fact in text, fact


def test_sections_and_their_order(page: str) -> None:
    parsed = Page(page)
    ids = [str(attributes["id"]) for tag, attributes in parsed.attributes if tag == "h2"]
    assert ids == SECTIONS
    named = [attributes["aria-labelledby"] for tag, attributes in parsed.attributes if tag == "section"]
    assert named == SECTIONS
    assert parsed.text.index("Keeps 9") < parsed.text.index("What is not good") < parsed.text.index("Measured")
    assert "not measured</p>" not in page
    figures = [
        *("Training loss, stage 1 (align)", "Training loss, stage 2 (distill)"),
        *("NLL by position", "KL by position", "Top-1 by position"),
        *("Recall by distance", "Recall by distance and pairs: teacher", "Recall by distance and pairs: final"),
        *("Alignment error", "Slot mass by head", "Slot mass by position", "Cache memory", "Decode latency"),
    ]
    assert re.findall(r"<figcaption><b>(.*?)</b>", page) == figures
    assert parsed.tags.count("svg") == len(figures)


def test_well_formed(page: str) -> None:
    parsed = Page(page)
    assert (parsed.unbalanced, parsed.open) == ([], [])
    assert "<not a tag> & 'quotes'" in " ".join(parsed.texts)
    assert Page("<p><b>x</p></b>").unbalanced and Page("<p>").open  # the check can fail


def test_self_contained(page: str) -> None:
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\((?!#)", page)
    parsed = Page(page)
    assert all(link.startswith("#") for link in parsed.links)
    assert not {"script", "link", "img", "iframe", "object", "embed", "video"} & set(parsed.tags)


def test_accessible(page: str) -> None:
    parsed = Page(page)
    plots = [attributes for tag, attributes in parsed.attributes if tag == "svg"]
    assert all(plot["role"] == "img" and plot["aria-label"] for plot in plots)
    assert len({plot["aria-label"] for plot in plots}) == len(plots)
    assert parsed.tags.count("caption") == parsed.tags.count("table") == 7
    scrolling = [attributes for _, attributes in parsed.attributes if attributes.get("class") == "scroll"]
    assert all(one["tabindex"] == "0" and one["aria-label"] for one in scrolling)
    assert len(scrolling) == parsed.tags.count("table") - 1  # the last has two columns that wrap


def test_light_dark_and_phone(page: str) -> None:
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page
    style, body = page.split("</style>", 1)
    used = set(re.findall(r"var\((--[a-z-]+)\)", page))
    light, dark = style.split("@media (prefers-color-scheme: dark)", 1)
    for variable in used:
        assert f"{variable}:" in light and f"{variable}:" in dark, variable
    # plots take every colour from the page: a fixed one would vanish in one of the schemes
    assert not re.findall(r"#0[123]00\d\d|(?:fill|stroke): ?(?:black|#(?!fff)[0-9a-f]{6})", body)


def test_colours_can_be_read() -> None:
    """Text, warnings and notes against both grounds, by the contrast that WCAG asks of small text."""
    from nha_convert.report_style import STYLE

    def luminance(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    light, dark = STYLE.split("@media (prefers-color-scheme: dark)", 1)
    for scheme in (light, dark.split("}", 1)[0]):
        colours = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", scheme))
        lines = ("teacher", "window-only", "memory-only", "no-attention", "swapped", "aligned", "final", "other")
        for ground in ("page", "card"):
            for name, least in [*((text, 4.5) for text in ("text", "soft", "bad")), *((line, 3.0) for line in lines)]:
                low, high = sorted((luminance(colours[name]), luminance(colours[ground])))
                assert (high + 0.05) / (low + 0.05) >= least, (name, ground)


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
    for name in ("eval.json", "verify.json", "bench.json", "metrics.jsonl", "plan.json", "run.json"):
        (run_dir / name).unlink()
    (run_dir / "evaluation").mkdir()
    (run_dir / "evaluation" / "teacher.json").write_text(json.dumps(row("teacher", 2.5432)))
    page = write_report(run_dir).read_text()
    assert "The run is not finished: the final model is not measured." in page
    assert "What is not good" not in page
    assert "<li>memory recovery (or" in page and "<li>the exported model (nha-convert verify RUN).</li>" in page
    # loss, KL, top-1, recall, pairs, alignment, two of slot mass, cache, latency; NLL by position is there
    assert page.count("<p>not measured</p>") == 10
    assert page.count('<p class="soft">not measured') == 3  # costs, layers, branches
    assert "<td>2.5432<small>[2.293, 2.668]</small></td>" in page
    assert re.search(r'<tr class="final"><th scope="row">final</th>(<td>–</td>)+</tr>', page)
    assert Page(page).unbalanced == []


def test_measured_but_not_summarised(run_dir: Path) -> None:
    evaluation = json.loads((run_dir / "eval.json").read_text())
    (run_dir / "eval.json").unlink()
    (run_dir / "evaluation").mkdir()
    branches = {"memory_only": row("memory_only", 6.1234)}
    final = evaluation["final"] | {"memory_recovery": 0.8765, "branches": branches}
    for name, content in (("final", final), ("teacher", evaluation["teacher"])):
        (run_dir / "evaluation" / f"{name}.json").write_text(json.dumps(content))
    page = write_report(run_dir).read_text()
    assert "<td>6.1234<small>" in page and "<td>0.876</td>" in page and "Memory recovery is 0.876" in page


def test_one_row_of_recall_where_no_pairs_were_asked(run_dir: Path) -> None:
    evaluation = json.loads((run_dir / "eval.json").read_text())
    for key in ("teacher", "final"):
        del evaluation[key]["tasks"]
    evaluation["settings"] = {"evaluate": {"recall_pairs": 23}}
    (run_dir / "eval.json").write_text(json.dumps(evaluation))
    page = write_report(run_dir).read_text()
    assert ">23<" in page and "Recall by distance and pairs: final" in page


def test_a_large_model(run_dir: Path) -> None:
    """64 layers of 32 heads: heatmaps without numbers, and no plot grows beyond measure."""
    evaluation = json.loads((run_dir / "eval.json").read_text())
    layers = list(range(64))
    many = [[0.001 * (layer + head) for head in range(32)] for layer in layers]
    evaluation["final"]["slot_usage"] = usage(layers) | {"slot_mass": many}
    (run_dir / "eval.json").write_text(json.dumps(evaluation))
    page = write_report(run_dir).read_text()
    (svg,) = [part for part in page.split("<svg")[1:] if "by layer and query head" in part[:300]]
    assert svg.count("<text") + svg.count("<tspan") < 100  # axes alone
    width, height = (float(x) for x in re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups())  # type: ignore
    assert height < 3 * width


def test_failed_verification_is_said(run_dir: Path) -> None:
    (run_dir / "verify.json").write_text(json.dumps({"passed": False}))
    assert "The exported model failed its verification." in write_report(run_dir).read_text()


def test_not_a_run_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no recipe.yaml"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_damaged_files_are_named(run_dir: Path) -> None:
    (run_dir / "bench.json").write_text("{")
    with pytest.raises(InputError, match=r"bench\.json: cannot be read as JSON"):
        write_report(run_dir)
    (run_dir / "bench.json").unlink()
    (run_dir / "recipe.yaml").write_text("a: [")
    with pytest.raises(InputError, match=r"recipe\.yaml: not valid YAML"):
        write_report(run_dir)
