"""The page in a real browser, and that the check can fail (slow; skips itself without playwright and a Chromium)."""

import importlib.util
from pathlib import Path

import pytest
from test_report import make_run

from nha_convert.report import write_report
from tools.check_report import SCHEMES, SIZES, check, find_browser

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="playwright is not installed"),
    pytest.mark.skipif(find_browser() is None, reason="no Chromium on this machine"),
]


def looked_at(page: Path, out: Path) -> list[str]:
    return check(page, out, str(find_browser()))


def test_a_report(tmp_path: Path) -> None:
    page = write_report(make_run(tmp_path))
    assert looked_at(page, tmp_path / "shots") == []
    pictures = sorted(path.name for path in (tmp_path / "shots").iterdir())
    assert pictures == sorted(f"{size}-{scheme}.png" for size in SIZES for scheme in SCHEMES)


def test_an_unfinished_one(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("model: embedded\n")
    assert looked_at(write_report(tmp_path), tmp_path / "shots") == []


def test_what_is_wrong_is_found(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(
        '<!doctype html><html lang="en"><body><main><div style="width: 900px">wide</div>'
        '<svg viewBox="0 0 300 40" width="300" aria-label="plot"><text x="290" y="20" font-size="12">outside</text>'
        '<text x="5" y="20" style="font-size: 3px">tiny</text><text x="200" y="20">one</text>'
        '<text x="205" y="22">two</text></svg><svg></svg>'
        '<img src="missing.png" alt=""><script>console.warn("careful")</script></main></body></html>'
    )
    wrong = [line for line in looked_at(page, tmp_path / "shots") if line.startswith("phone, dark: ")]
    for words in (
        "px wide, the window 360",
        "<div> reaches to",
        '"outside" leaves the plot "plot"',
        '"tiny" of the plot "plot" is 3.0 px high',
        '"two" lies on "one" in the plot "plot"',
        "a plot has no aria-label",
        "console warning: careful",
        "request for file://",
    ):
        assert any(words in line for line in wrong), (words, wrong)
