"""The acceptance line of the report page, in a real browser."""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import Any

from tools.acceptance_base import ROOT, line, run
from tools.check_report import SCHEMES, SIZES, check, find_browser


@line(
    "browser",
    "the demo's report.html in headless Chromium: phone and desktop, light and dark",
    "no console message, no request; nothing leaves the page or its plot, overlaps, or is too small to read",
)
def browser() -> dict[str, Any]:
    """Looks at the page of the run that `demo` keeps; where playwright, a Chromium or the page is missing, says so."""
    kept = ROOT / "runs" / "acceptance"
    page, found = kept / "demo" / "report.html", find_browser()
    if found is None or find_spec("playwright") is None:
        needed = "pip install 'nha-convert[report-check]', apt-get install chromium"
        return {"measured": f"not measured: playwright and a Chromium are needed ({needed})", "met": False}
    if not page.is_file():
        return {"measured": "not measured: `python tools/acceptance.py demo` makes the page", "met": False}
    wrong = check(page, kept / "screenshots", found)
    version = re.search(r"[\d.]+", run([found, "--version"], ROOT).stdout)
    plots = page.read_text(encoding="utf-8").count("<svg")
    text = f"{len(SIZES) * len(SCHEMES)} views of {plots} plots in Chromium {version[0] if version else ''}: "
    return {"measured": "; ".join([f"{text}{len(wrong)} complaints", *wrong]), "met": not wrong}
