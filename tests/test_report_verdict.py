"""The first words of a report: good runs, dead memories, unfinished runs, nothing timed."""

import math
from typing import Any

import pytest

from nha_convert.report_verdict import likelihood, ratio_of_shares, recall, verdict


def cell(exact: float, prompts: int = 64, reach: float = 0.05, **more: Any) -> dict[str, Any]:
    low, high = max(0.0, exact - reach), min(1.0, exact + reach)
    return {"exact_match": exact, "low": low, "high": high, "prompts": prompts, **more}


def evaluation(nll: float = 2.51, exact: float = 0.875, **final: Any) -> dict[str, Any]:
    intervals = {
        "bootstrap": {"windows": 32, "draws": 1000, "seed": 7},
        "nll_above_teacher": [nll - 2.505, nll - 2.495],
        "memory_recovery": [0.9, 0.98],
        "kl": [0.01, 0.02],
        "top1": [0.91, 0.94],
    }
    measured = {"nll": nll, "kl": 0.015, "top1": 0.93, "memory_recovery": 0.95, "intervals": intervals}
    gains = [{"layer": layer, "nll": nll, "nll_gain": 0.01, "interval": [0.005, 0.015]} for layer in (0, 2)]
    return {
        "teacher": {"nll": 2.5, "recall": {"128": cell(1.0), "512": cell(0.75)}},
        "final": measured | {"recall": {"128": cell(1.0), "512": cell(exact - 0.125)}, "layer_ablation": gains} | final,
    }


def bench(ratio: float = 5.25, share: float = 0.04, low: float | None = None) -> dict[str, Any]:
    def row(context: int, times: float) -> dict[str, Any]:
        return {
            "context": context,
            "teacher": {"median": 0.1 * times},
            "student": {"median": 0.1},
            "ratio": {"median": times, "low": low or 0.9 * times, "high": 1.1 * times, "confidence": 0.96, "runs": 20},
            "cache_bytes": {"teacher": 10**8, "student": round(share * 10**8)},
        }

    return {"decode": [row(1024, max(1.0, ratio / 5)), row(32768, ratio)], "prefill": []}


PASSED = {"passed": True, "max_logit_difference": 1.5e-6}


def plain(text: str) -> str:
    return text.replace("\u00a0", " ")


def test_a_good_run() -> None:
    said = verdict(evaluation(), PASSED, bench())
    assert plain(said.lead) == (
        "Keeps 99.0 % of the teacher's quality (95 % interval 98.5 to 99.5), uses 4 % of its cache memory and decodes "
        "5.2 × faster at 32,768 tokens."
    )
    assert said.wrong == []
    assert said.how[0].startswith("What it keeps of the teacher: likelihood 99.0 % [98.5, 99.5], recall 100.0 % [")
    assert "takes 100 ms instead of 525 ms, and the cache 4 MB instead of 100 MB." in said.how[1]
    assert "Medians of 20 turns; of the ratio 4.73 to 5.78, the interval that holds the true median" in said.how[1]
    assert said.how[1].endswith("with 96 % confidence.")
    assert "bootstrap over 32 windows, seed 7" in said.definition
    assert any("Memory recovery is 0.950 [0.900, 0.980]" in line for line in said.good)
    assert any("KL to the teacher is 0.0150 [0.0100, 0.0200] nats" in line for line in said.good)
    assert any("gives the run's logits (largest difference of a logit 1.5e-06)" in line for line in said.good)
    assert said.missing == ["recall by number of pairs (nha-convert eval RUN --save --set 'evaluate.tasks=[mqar]')"]


def test_the_smaller_share_leads() -> None:
    lost = verdict(evaluation(exact=0.375), PASSED, bench())  # 0.25 instead of 0.75 at 512 tokens
    assert plain(lost.lead).startswith("Keeps 71.4 % of the teacher's quality (95 % interval ")
    assert lost.wrong == ["Recall is lost: at 512 tokens 0.25 [0.20, 0.30], teacher 0.75 [0.70, 0.80]."]
    better = verdict(evaluation(nll=2.45), PASSED, bench())
    assert plain(better.lead).startswith("Keeps 100.0 % of the teacher's quality")  # never more than all
    assert "likelihood 105.1 %" in better.how[0]


def test_a_dead_memory() -> None:
    dead = {
        "memory_recovery": -0.02,
        "intervals": {"memory_recovery": [-0.1, -0.001], "nll_above_teacher": [0.0, 0.02]},
        "layer_ablation": [
            {"layer": 0, "nll": 2.5, "nll_gain": -0.0001, "interval": [-0.0004, 0.0002]},
            {"layer": 1, "nll": 2.5, "nll_gain": 0.01, "interval": [0.004, 0.02]},
        ],
    }
    said = verdict(evaluation(**dead), PASSED, bench())
    assert said.wrong == [
        "The slots of 1 of 2 NHA layers may be unused. They lower the NLL, in nats, in layer 0 by -0.0001 [-0.0004, "
        "0.0002].",
        "Memory recovery is -0.020 [-0.100, -0.001] (1 is the teacher, 0 a dead memory): the memory is dead.",
    ]


@pytest.mark.parametrize(
    ("interval", "words"),
    [([0.2, 0.6], ": below 0.85."), ([0.7, 0.95], ": less than 0.85 is not ruled out."), (None, "(no interval)")],
)
def test_a_weak_memory(interval: list[float] | None, words: str) -> None:
    final = {"memory_recovery": 0.8, "intervals": {"memory_recovery": interval}}
    (line,) = verdict(evaluation(**final), PASSED, bench()).wrong
    assert line.startswith("Memory recovery is 0.800") and words in line


def test_recall_without_the_slots() -> None:
    """As in a model whose full layer does the recall: said, unless masking the slots costs answers."""
    rows = evaluation()
    rows["window_only"] = {"nll": 2.6, "recall": {"128": cell(1.0), "512": cell(0.6875)}}
    assert verdict(rows, PASSED, bench()).wrong == [
        "Recall does not show the memory at work: the model gives 0.88 [0.81, 0.92] of the answers, and 0.84 with its "
        "slots masked, through the window or full layers."
    ]
    rows["window_only"]["recall"] = {"128": cell(0.5), "512": cell(0.0)}
    assert verdict(rows, PASSED, bench()).wrong == []
    rows["final"]["recall"] = rows["window_only"]["recall"] = {"128": cell(0.0)}  # nothing to explain
    assert not any("at work" in line for line in verdict(rows, PASSED, bench()).wrong)


def test_nothing_timed() -> None:
    said = verdict(evaluation(), None, None)
    assert plain(said.lead) == (
        "Keeps 99.0 % of the teacher's quality (95 % interval 98.5 to 99.5); its cache memory and speed are not "
        "measured."
    )
    assert "cache memory and speed (nha-convert bench RUN)" in said.missing
    assert "the exported model (nha-convert verify RUN)" in said.missing
    assert verdict(evaluation(), None, {"decode": [], "prefill": []}).lead == said.lead


def test_slower_and_larger() -> None:
    said = verdict(evaluation(), PASSED, bench(ratio=0.5, share=1.25))
    assert "uses 125 % of its cache memory and decodes at 0.50 × the teacher's speed at 32,768" in plain(said.lead)
    assert said.wrong == [
        "Decoding is slower than the teacher's: at 32,768 tokens 0.50 × its speed.",
        "The cache is larger than the teacher's at 1,024, 32,768 tokens.",
    ]


def test_an_unfinished_run() -> None:
    for rows in ({}, {"teacher": {"nll": 2.5}}):
        said = verdict(rows, None, None)
        assert said.lead == "The run is not finished: the final model is not measured."
        assert (said.how, said.wrong, said.good) == ([], [], [])
        assert any(line.startswith("memory recovery") for line in said.missing)


def test_failed_verification_and_far_from_the_teacher() -> None:
    said = verdict(evaluation(kl=0.4), {"passed": False}, bench())
    assert said.wrong[0].endswith("that is above 0.05 nats.")
    assert said.wrong[1] == "The exported model failed its verification."


def test_old_evaluations_without_intervals() -> None:
    rows = {"teacher": {"nll": 2.0}, "final": {"nll": 2.1}, "memory_recovery": {"final": 0.9}}
    said = verdict(rows, None, None)
    assert plain(said.lead).startswith("Keeps 90.5 % of the teacher's quality; its cache")
    assert any("Memory recovery is 0.900 (no interval)" in line for line in said.good)


def test_likelihood_is_the_ratio_of_perplexities() -> None:
    kept = likelihood(evaluation(nll=2.6))
    assert kept is not None and kept.value == pytest.approx(math.exp(2.5) / math.exp(2.6))
    assert kept.low == pytest.approx(math.exp(-0.105)) and kept.high == pytest.approx(math.exp(-0.095))


def test_recall_needs_a_teacher_that_recalls() -> None:
    rows = evaluation()
    rows["teacher"]["recall"] = {"128": cell(0.1), "512": cell(0.1)}
    assert recall(rows) is None
    tasks = {"mqar": [cell(0.5, 16, distance=64, pairs=4), {"distance": 9, "pairs": 4, "left_out": "no room"}]}
    only_pairs = {"teacher": {"nll": 1.0, "tasks": tasks}, "final": {"nll": 1.0, "tasks": tasks}}
    assert recall(only_pairs) is not None and recall(only_pairs).value == 1.0  # type: ignore[union-attr]


def test_the_ratio_of_two_shares_holds_its_level() -> None:
    """Of 95 % intervals, about 95 % hold the true ratio; at shares of 1, too, where a normal one has no width."""
    import numpy

    generator = numpy.random.default_rng(0)
    for ours, theirs in ((0.9, 0.95), (0.5, 0.98), (0.999, 0.999)):
        held = 0
        for a, b in zip(generator.binomial(128, ours, 2000), generator.binomial(128, theirs, 2000)):
            found = ratio_of_shares(int(a), int(b), 128)
            assert found.low is not None and found.high is not None and found.low <= found.value <= found.high
            held += found.low <= ours / theirs <= found.high
        assert 0.93 <= held / 2000 <= 1.0, (ours, theirs, held)
    certain = ratio_of_shares(64, 64, 64)
    assert certain.low is not None and 0.9 < certain.low < 1.0 and certain.high == pytest.approx(1 / certain.low)
    assert ratio_of_shares(1, 1, 5).low is None
