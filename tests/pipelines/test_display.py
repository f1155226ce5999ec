"""The display, on a terminal of 80 columns and where there is none."""

import io

import pytest
from rich.cells import cell_len
from rich.console import Console

from gru.training.progress import progress_line, sample_line
from pipelines.display import Display

METRICS = {"train/loss": 3.311, "train/tokens_per_second": 6539.0, "train/memory_gigabytes": 1.2}
PROGRESS = progress_line(640, 1200, METRICS, [4.2, 3.9, 3.824], 262)


def console(terminal: bool) -> Console:
    return Console(file=io.StringIO(), width=80, force_terminal=terminal, color_system=None, legacy_windows=False)


def output(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_the_table_shows_a_training_in_two_lines() -> None:
    display = Display(console(True), ("prepare", "train", "evaluate"))
    display.watch("prepare", "done", "449 documents, 8.8 MB, 2,753,202 tokens")
    display.watch("train", "running", PROGRESS)
    shown = console(True)
    shown.print(display._table())
    lines = [line.rstrip() for line in output(shown)]
    assert lines[1] == "prepare   done     0:00   449 documents, 8.8 MB, 2,753,202 tokens"
    assert lines[2].startswith("train") and lines[2].endswith("0:00   step 640/1,200, 4:22 left, 6,539 tokens/s")
    assert lines[3:] == [" " * 26 + "loss 3.311, held-out 3.824 █▂▁, 1.2 GB", "evaluate  waiting"]


@pytest.mark.parametrize("text", ["x" * 300, "狐狸遇見烏鴉" * 30, "[/b] [red] \x1b[2J \n" * 20])
def test_a_sample_is_one_line_of_the_terminal_and_leaves_the_progress(text: str) -> None:
    shown = console(True)
    display = Display(shown, ("train",))
    display.watch("train", "running", PROGRESS)
    display.watch("train", "running", sample_line(500, text))
    [line] = output(shown)
    assert line.startswith(f"step 500: {text[:5]}") and line.rstrip().endswith("…")
    assert cell_len(line) <= 80 and "\x1b" not in line
    assert display.rows["train"] == ("running", PROGRESS)


def test_a_sample_of_a_sweep_names_its_trial() -> None:
    shown = console(True)
    display = Display(shown, ("model.hidden=256 train",))
    display.watch("model.hidden=256 train", "running", sample_line(500, "The fox"))
    assert output(shown) == ["model.hidden=256 step 500: The fox"]


def test_without_a_terminal_each_sample_is_a_plain_line() -> None:
    shown = console(False)
    with Display(shown, ("prepare", "train")) as display:
        display.watch("prepare", "done", "[2] documents")
        display.watch("train", "running", PROGRESS)
        display.watch("train", "running", sample_line(500, "[/b]" * 30))
        display.watch("train", "running", PROGRESS)  # too soon after the one before
    assert output(shown) == [
        "prepare   done       0:00  [2] documents",
        f"train     running    0:00  {PROGRESS}",
        f"train     running    0:00  sample at step 500: {'[/b]' * 30}",
    ]
