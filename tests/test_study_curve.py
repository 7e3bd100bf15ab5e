"""The study of quality against memory: its uniform points and its page."""

from __future__ import annotations

from typing import Any

from nha_convert.search.request import search_request
from tools import study_curve


def test_uniform_points_cost_what_a_search_says() -> None:
    request = search_request("align-only", windows="32,64,256,full", context=1024, method="kl")
    points = study_curve.uniform(request)
    assert [point["windows"] for point in points] == [[32] * 4, [64] * 4, [256] * 4]
    for window, point in zip(study_curve.WINDOWS, points):
        assert point["share"] * request.full_bytes == 4 * request.layer_bytes(window, 64)
    assert 0 < points[0]["share"] < points[1]["share"] < points[2]["share"] < 1


def test_the_page_goes_by_memory() -> None:
    def recall(share: float) -> dict[str, Any]:
        return {"128": {"exact_match": share, "prompts": 32}}

    def point(choice: str, windows: list[Any], share: float, nll: float) -> dict[str, Any]:
        kept = {"choice": choice, "windows": windows, "share": share, "nll": nll, "gap": [nll - 4.1, nll - 3.9]}
        return {**kept, "kl": 0.1, "recall": recall(share)}

    points = [point("greedy", [32, "full"], 0.75, 4.04), point("32 each", [32, 32], 0.5, 4.2)]
    model = {"name": "a", "teacher": {"nll": 4.0, "recall": recall(1.0)}, "points": points}
    rows = [line for line in study_curve.page([model]).splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == ["choice", "---", "teacher", "32 each", "greedy"]
    assert rows[-1] == "| greedy | 32, full | 75.0 % | +1.00 % (-1.50 to +3.50) | 0.75 |"
