"""The report of the evaluate job for people. The job itself is tested with the pipeline."""

from gru.evaluation.context import ContextLoss
from gru.evaluation.samples import CopyShares
from gru.evaluation.scores import Scores
from jobs.evaluate import report


def test_the_report_has_scores_copies_and_a_sample_at_each_temperature() -> None:
    model, ngram = (Scores(nats, 100, 200, 100, "digest") for nats in (110.0, 160.0))
    contexts = [ContextLoss(1, 1, 9, 2.5, 1.4, 0.1), ContextLoss(2, 2, 9, 1.1, 0.0, 0.1), ContextLoss(3, 4, 9, 9, 9, 9)]
    shares = {
        "temperature-0.5": CopyShares(0.125, 0.5),
        "temperature-1": CopyShares(0.0, None),
        "heldout": CopyShares(None, 0.25),
    }
    samples = {0.5: "\r\nThe crow\r\n  met \x1b[31mthe fox.\n", 1.0: "狐狸"}
    lines = list(report(model, ngram, contexts, shares, 4_200_000, samples))
    rows = [line.split() for line in lines]
    assert ["nats", "per", "character", "1.100", "1.600"] in rows
    assert ["1", "2.500", "1.400"] in rows and ["3", "to", "4", "9.000", "9.000"] not in rows
    assert ["temperature-0.5", "12.5%", "50.0%"] in rows and ["temperature-1", "0.0%"] in rows
    assert ["heldout", "25.0%"] in rows
    assert lines[-5:] == [
        "sample at temperature 0.5:",
        "    The crow",
        "      met \N{REPLACEMENT CHARACTER}[31mthe fox.",
        "sample at temperature 1:",
        "    狐狸",
    ]
    assert "4.2 MB of training text" in lines[-6]
