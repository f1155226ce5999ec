"""The report of a comparison: medians over seeds, a table, and a plot."""

import math
from collections.abc import Callable, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from gru.comparison.contenders import TRANSFORMER
from gru.comparison.trial import MEASUREMENTS, STREAM_LENGTHS, TrialRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Trials = dict[str, list[TrialRecord]]
"""The records of all seeds, by contender."""


def summarise(trials: Trials) -> dict[str, dict[str, Any]]:
    """Return a row of plain JSON for each contender: medians over its seeds, None where the median trial diverged."""
    return {name: _row(records) for name, records in trials.items()}


def _row(records: list[TrialRecord]) -> dict[str, Any]:
    def median_of(value: Callable[[TrialRecord], float | None]) -> float | None:
        result = median(math.inf if (v := value(record)) is None else v for record in records)
        return result if math.isfinite(result) else None

    def at(mark: int) -> dict[str, float | None]:
        return {
            "nats_per_character": median_of(lambda r: _divide(_loss_at(r, mark), r["characters_per_token"])),
            "bits_per_byte": median_of(lambda r: _divide(_loss_at(r, mark), r["bytes_per_token"] * math.log(2))),
        }

    return {
        "parameters": records[0]["parameters"],
        "seeds": len(records),
        "diverged": sum(record["diverged"] is not None for record in records),
        "tokens_per_second": median(record["tokens_per_second"] for record in records),
        "quarters": [at((quarter + 1) * MEASUREMENTS // 4 - 1) for quarter in range(4)],
        "end": {
            "nats_per_character": median_of(lambda r: r["nats_per_character"]),
            "bits_per_byte": median_of(lambda r: r["bits_per_byte"]),
        },
        "state_bytes": records[0]["state_bytes"],
    }


def _loss_at(record: TrialRecord, mark: int) -> float | None:
    """Return the held-out loss at a measurement; None if the trial diverged before."""
    return record["heldout"][mark] if mark < len(record["heldout"]) else None


def _divide(loss: float | None, divisor: float) -> float | None:
    return None if loss is None else loss / divisor


def compare(trials: Trials, one: str, other: str) -> list[bool]:
    """Return for each measurement whether the median held-out loss of `one` is lower than that of `other`."""

    def medians(name: str) -> list[float]:
        return [
            median(math.inf if (loss := _loss_at(record, mark)) is None else loss for record in trials[name])
            for mark in range(MEASUREMENTS)
        ]

    return [a < b for a, b in zip(medians(one), medians(other), strict=True)]


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Return the rows of `summarise` as a Markdown table, with notes."""
    quarters = ["25 %", "50 %", "75 %", "100 %"]
    head = ["", "parameters", "tokens/s"]
    for unit in ("nats/character", "bits/byte"):
        head += [f"{unit} at {quarter}" for quarter in quarters] + [f"{unit} on all"]
    head += [f"state at {tokens:,}" for tokens in STREAM_LENGTHS]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for name, row in rows.items():
        cells = [name, f"{row['parameters']:,}", f"{row['tokens_per_second']:,.0f}"]
        for unit in ("nats_per_character", "bits_per_byte"):
            values = [*(quarter[unit] for quarter in row["quarters"]), row["end"][unit]]
            cells += ["diverged" if value is None else f"{value:.4f}" for value in values]
        cells += [f"{row['state_bytes'][str(tokens)]:,} B" for tokens in STREAM_LENGTHS]
        lines.append(cells)
    notes = [
        f'Medians over {max(row["seeds"] for row in rows.values())} seed(s), at equal training times; "on all" is the '
        "loss on all held-out text after training. State: memory of one stream after that many tokens, in fp32."
    ]
    if TRANSFORMER in {name.partition("-")[0] for name in rows}:
        notes.append(
            "The Transformer's state is the keys and values of all these tokens; it was trained on its sequence length."
        )
    return "\n".join([*("| " + " | ".join(cells) + " |" for cells in lines), "", *notes, ""])


def plot(trials: Trials, seconds: float) -> "Figure":
    """Return a figure of held-out loss over time, reach of gradients, training speed, and memory of a stream."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9), layout="constrained")
    (losses, reach), (speed, memory) = figure.subplots(2, 2)
    times = [seconds * (mark + 1) / MEASUREMENTS for mark in range(MEASUREMENTS)]
    colours = {name: f"C{index}" for index, name in enumerate(trials)}
    plotted: list[float] = []
    for name, records in trials.items():
        curves = [
            [loss / record["characters_per_token"] for loss in record["heldout"]]
            for record in records
            if record["heldout"]
        ]
        marks = list(zip(*curves, strict=False))
        plotted += [value for values in marks[1:] or marks for value in values]
        losses.plot(times[: len(marks)], [median(values) for values in marks], color=colours[name], label=name)
        bounds = [[bound(values) for values in marks] for bound in (min, max)]
        losses.fill_between(times[: len(marks)], *bounds, color=colours[name], alpha=0.2, linewidth=0)
        if reaches := [record["reach"] for record in records if record["reach"]]:
            reach.plot([median(values) for values in zip(*reaches, strict=False)], color=colours[name], label=name)
        state = [records[0]["state_bytes"][str(tokens)] for tokens in STREAM_LENGTHS]
        memory.plot(*_line(STREAM_LENGTHS, state), color=colours[name], label=name)
    if plotted:
        margin = 0.05 * (max(plotted) - min(plotted))
        losses.set_ylim(min(plotted) - margin, max(plotted) + margin)
    speeds = [median(record["tokens_per_second"] for record in records) for records in trials.values()]
    speed.bar(list(trials), speeds, color=list(colours.values()))
    losses.set(title="Held-out loss", xlabel="seconds of training", ylabel="nats per character")
    reach.set(
        title="Gradient of the loss with respect to the input k tokens before",
        xlabel="k",
        ylabel="norm, relative to k = 0",
        yscale="log",
        ylim=(1e-8, 2),
    )
    speed.set(title="Training speed", ylabel="tokens per second")
    memory.set(title="Memory of one served stream", xlabel="tokens read", ylabel="bytes", xscale="log", yscale="log")
    for axes in (losses, reach, memory):
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def _line(tokens: Sequence[int], state: Sequence[int]) -> tuple[list[int], list[float]]:
    """Return points of a line through two or more states: memory is linear in the number of tokens."""
    slope = (state[-1] - state[0]) / (tokens[-1] - tokens[0])
    lengths = [1, 10, 100, *tokens]
    return lengths, [state[0] + slope * (length - tokens[0]) for length in lengths]
