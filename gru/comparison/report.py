"""What came of a comparison: medians over seeds, a table, a picture, and who was better when."""

import math
from collections.abc import Callable, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from gru.comparison.contenders import TRANSFORMER
from gru.comparison.trial import MEASUREMENTS, STREAMS, TrialRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Runs = dict[str, list[TrialRecord]]
"""Records of all seeds by contender."""


def summarise(runs: Runs) -> dict[str, dict[str, Any]]:
    """A row of plain JSON for each contender: medians over its seeds, None where that one diverged."""
    return {name: _row(records) for name, records in runs.items()}


def _row(records: list[TrialRecord]) -> dict[str, Any]:
    def middle(value: Callable[[TrialRecord], float | None]) -> float | None:
        found = median(math.inf if (v := value(record)) is None else v for record in records)
        return found if math.isfinite(found) else None

    def at(mark: int) -> dict[str, float | None]:
        return {
            "nats_per_character": middle(lambda r: _scaled(_loss(r, mark), r["characters_per_token"])),
            "bits_per_byte": middle(lambda r: _scaled(_loss(r, mark), r["bytes_per_token"] * math.log(2))),
        }

    return {
        "parameters": records[0]["parameters"],
        "seeds": len(records),
        "diverged": sum(record["diverged"] is not None for record in records),
        "tokens_per_second": median(record["tokens_per_second"] for record in records),
        "quarters": [at((quarter + 1) * MEASUREMENTS // 4 - 1) for quarter in range(4)],
        "end": {
            "nats_per_character": middle(lambda r: r["nats_per_character"]),
            "bits_per_byte": middle(lambda r: r["bits_per_byte"]),
        },
        "state_bytes": records[0]["state_bytes"],
    }


def _loss(record: TrialRecord, mark: int) -> float | None:
    return record["heldout"][mark] if mark < len(record["heldout"]) else None


def _scaled(loss: float | None, by: float) -> float | None:
    return None if loss is None else loss / by


def better(runs: Runs, one: str, other: str) -> list[bool]:
    """Whether a contender's median held-out loss is lower than another's, at each equal time."""

    def medians(name: str) -> list[float]:
        return [
            median(math.inf if (loss := _loss(record, mark)) is None else loss for record in runs[name])
            for mark in range(MEASUREMENTS)
        ]

    return [a < b for a, b in zip(medians(one), medians(other), strict=True)]


def table(rows: dict[str, dict[str, Any]]) -> str:
    """In Markdown."""
    quarters = ["25 %", "50 %", "75 %", "100 %"]
    head = ["", "parameters", "tokens/s"]
    for unit in ("nats/character", "bits/byte"):
        head += [f"{unit} at {quarter}" for quarter in quarters] + [f"{unit} on all"]
    head += [f"state at {tokens:,}" for tokens in STREAMS]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for name, row in rows.items():
        cells = [name, f"{row['parameters']:,}", f"{row['tokens_per_second']:,.0f}"]
        for unit in ("nats_per_character", "bits_per_byte"):
            values = [*(quarter[unit] for quarter in row["quarters"]), row["end"][unit]]
            cells += ["diverged" if value is None else f"{value:.4f}" for value in values]
        cells += [f"{row['state_bytes'][str(tokens)]:,} B" for tokens in STREAMS]
        lines.append(cells)
    notes = [
        f"Medians over {max(row['seeds'] for row in rows.values())} seed(s), at equal times of training; the last of "
        "each is at the end, on all held-out text. State: of one stream after so many tokens, in fp32."
    ]
    if TRANSFORMER in {name.partition("-")[0] for name in rows}:
        notes.append("The Transformer's state is the keys and values of all those tokens; it is trained on its window.")
    return "\n".join([*("| " + " | ".join(cells) + " |" for cells in lines), "", *notes, ""])


def picture(runs: Runs, seconds: float) -> "Figure":
    """Held-out loss over time, reach of gradients, speed, and memory of a stream."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9), layout="constrained")
    (losses, reach), (speed, memory) = figure.subplots(2, 2)
    times = [seconds * (mark + 1) / MEASUREMENTS for mark in range(MEASUREMENTS)]
    colours = {name: f"C{index}" for index, name in enumerate(runs)}
    shown: list[float] = []
    for name, records in runs.items():
        curves = [
            [loss / record["characters_per_token"] for loss in record["heldout"]]
            for record in records
            if record["heldout"]
        ]
        marks = list(zip(*curves, strict=False))
        shown += [value for values in marks[1:] or marks for value in values]
        losses.plot(times[: len(marks)], [median(values) for values in marks], color=colours[name], label=name)
        bounds = [[bound(values) for values in marks] for bound in (min, max)]
        losses.fill_between(times[: len(marks)], *bounds, color=colours[name], alpha=0.2, linewidth=0)
        if reaches := [record["reach"] for record in records if record["reach"]]:
            reach.plot([median(values) for values in zip(*reaches, strict=False)], color=colours[name], label=name)
        state = [records[0]["state_bytes"][str(tokens)] for tokens in STREAMS]
        memory.plot(*_line(STREAMS, state), color=colours[name], label=name)
    if shown:
        margin = 0.05 * (max(shown) - min(shown))
        losses.set_ylim(min(shown) - margin, max(shown) + margin)
    speeds = [median(record["tokens_per_second"] for record in records) for records in runs.values()]
    speed.bar(list(runs), speeds, color=list(colours.values()))
    losses.set(title="Held-out loss", xlabel="seconds of training", ylabel="nats per character")
    reach.set(
        title="Gradient of the loss by the input k tokens before",
        xlabel="k",
        ylabel="norm, of that at k = 0",
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
    """Memory from the first token on: it is linear in them, with or without a slope."""
    slope = (state[-1] - state[0]) / (tokens[-1] - tokens[0])
    places = [1, 10, 100, *tokens]
    return places, [state[0] + slope * (place - tokens[0]) for place in places]
