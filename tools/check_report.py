"""Look at a run's report.html in headless Chromium: phone and desktop, light and dark.

    pip install playwright && apt-get install chromium      (the library's own browser download is not needed)
    python tools/check_report.py runs/demo --out /tmp/shots

Fails (exit 1, one line each) on a console message of level warning or above, on a request for anything but the page
itself, where the page can be scrolled sideways, where a text of a plot leaves its plot or lies on another, and where a
plot's text is smaller than can be read. Writes a screenshot of the whole page for each of the four.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SIZES = {"phone": (360, 800), "desktop": (1280, 900)}
SCHEMES = ("light", "dark")
LEAST_PIXELS = 8.0
"""Height of a plot's letters, as the browser shows them."""
PROBE = """
() => {
  const wrong = [], page = document.documentElement;
  if (page.scrollWidth > page.clientWidth)
    wrong.push(`the page is ${page.scrollWidth} px wide, the window ${page.clientWidth}`);
  for (const item of document.querySelectorAll('main *:not(.scroll *):not(pre *)')) {
    if (item.closest('svg') && item.tagName !== 'svg') continue;
    const box = item.getBoundingClientRect();
    if (box.right > page.clientWidth + 1) wrong.push(`<${item.tagName.toLowerCase()}> reaches to ${box.right} px`);
  }
  for (const svg of document.querySelectorAll('svg')) {
    const frame = svg.getBoundingClientRect(), name = svg.getAttribute('aria-label');
    if (!name) wrong.push('a plot has no aria-label');
    const before = [];
    for (const text of svg.querySelectorAll('text')) {
      const box = text.getBoundingClientRect(), said = text.textContent.trim();
      for (const [other, there] of before) {
        const wide = Math.min(box.right, other.right) - Math.max(box.left, other.left);
        const high = Math.min(box.bottom, other.bottom) - Math.max(box.top, other.top);
        if (wide > 1 && high > 0.5 * Math.min(box.height, other.height))
          wrong.push(`"${said}" lies on "${there}" in the plot "${name}"`);
      }
      before.push([box, said]);
      const across = Math.max(frame.left - box.left, box.right - frame.right);
      const out = Math.max(across, frame.top - box.top, box.bottom - frame.bottom);
      if (out > 1) wrong.push(`"${said}" leaves the plot "${name}" by ${out.toFixed(1)} px`);
      const size = parseFloat(getComputedStyle(text).fontSize) * frame.width / svg.viewBox.baseVal.width;
      if (size < LEAST) wrong.push(`"${said}" of the plot "${name}" is ${size.toFixed(1)} px high`);
    }
  }
  return wrong;
}
"""


def find_browser(wanted: str | None = None) -> str | None:
    """The path of a Chromium on this machine; None if there is none."""
    return wanted or next((path for name in BROWSERS if (path := shutil.which(name))), None)


def check(report: Path, out: Path, browser: str) -> list[str]:
    """What is wrong with a page, one line each; screenshots are written to `out`.

    Args:
        report: report.html.
        out: folder of the screenshots; made if missing.
        browser: path of a Chromium.
    """
    from playwright.sync_api import sync_playwright

    out.mkdir(parents=True, exist_ok=True)
    wrong: list[str] = []
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's sandbox does not start for root
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=arguments)
        try:
            for size in SIZES:
                for scheme in SCHEMES:
                    found = _look(chromium, report.resolve(), size, scheme, out / f"{size}-{scheme}.png")
                    wrong += [f"{size}, {scheme}: {line}" for line in found]
        finally:
            chromium.close()
    return wrong


def _look(chromium: Any, report: Path, size: str, scheme: str, picture: Path) -> list[str]:
    width, height = SIZES[size]
    context = chromium.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page, wrong = context.new_page(), []

    def console(message: Any) -> None:
        if message.type in ("warning", "error", "assert"):
            wrong.append(f"console {message.type}: {message.text}")

    def request(one: Any) -> None:
        if one.url != report.as_uri():
            wrong.append(f"request for {one.url[:200]}")

    page.on("console", console)
    page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    page.on("request", request)
    page.goto(report.as_uri(), wait_until="networkidle")
    wrong += page.evaluate(PROBE.replace("LEAST", str(LEAST_PIXELS)))
    page.screenshot(path=str(picture), full_page=True)
    context.close()
    return wrong


def main() -> None:
    """Check one run folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder with a report.html")
    parser.add_argument("--out", type=Path, required=True, help="folder for the four screenshots")
    parser.add_argument("--browser", help="path of a Chromium; else the first of " + ", ".join(BROWSERS))
    options = parser.parse_args()
    report, browser = options.run / "report.html", find_browser(options.browser)
    if not report.is_file():
        sys.exit(f"error: {report}: is missing; write it: nha-convert report {options.run}")
    if browser is None:
        sys.exit("error: no Chromium found; install one (Debian: apt-get install chromium) or name it with --browser")
    wrong = check(report, options.out, browser)
    print("\n".join(wrong) if wrong else f"{report}: nothing wrong; screenshots in {options.out}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
