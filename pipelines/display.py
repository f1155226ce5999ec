"""The display of a running workflow: a live table of its stages, or plain lines where there is no terminal."""

import time
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from gru.terminal import duration
from gru.training.progress import SAMPLE

SECONDS_BETWEEN_LINES = 10.0
COLOURS = {
    **{"waiting": "dim", "running": "cyan", "done": "green", "cached": "green"},
    **{"failed": "red", "cancelled": "yellow", "unfinished": "yellow"},
}


class Display:
    """Shows the stages of a workflow, whose threads report their states to `watch`.

    Samples of a training scroll above the table, each in one line of the terminal.
    """

    def __init__(self, console: Console, stages: tuple[str, ...]) -> None:
        self.console = console
        self.rows = dict.fromkeys(stages, ("waiting", ""))
        self.started: dict[str, float] = {}
        self.ended: dict[str, float] = {}
        self.spinner = Spinner("dots")
        self.live = Live(get_renderable=self._table, console=console, refresh_per_second=4, transient=False)
        self.last_line = 0.0

    def __enter__(self) -> "Display":
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self.live.stop()

    def watch(self, stage: str, state: str, detail: str) -> None:
        """Show a stage's new state, with a line of detail."""
        before, _ = self.rows[stage]
        now = time.monotonic()
        self.started.setdefault(stage, now)
        if state != "running":
            self.ended[stage] = now
        if detail.startswith(SAMPLE):
            self._show_sample(stage, detail)
            return
        self.rows[stage] = (state, detail)
        if not self.console.is_terminal and (state != before or now - self.last_line > SECONDS_BETWEEN_LINES):
            self.last_line = now
            self._print_line(stage, state, detail)

    def _show_sample(self, stage: str, line: str) -> None:
        if self.console.is_terminal:
            shown = Text(f"{stage.removesuffix('train')}step {line.removeprefix(SAMPLE)}", style="dim")
            self.console.print(shown, no_wrap=True, overflow="ellipsis")
        else:
            self._print_line(stage, "running", line)

    def _print_line(self, stage: str, state: str, detail: str) -> None:
        line = f"{stage:9} {state:9} {self._elapsed(stage):>5}  {detail}"
        self.console.print(line, highlight=False, soft_wrap=True, markup=False)

    def _elapsed(self, stage: str) -> str:
        if stage not in self.started:
            return ""
        return duration(self.ended.get(stage, time.monotonic()) - self.started[stage])

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False)
        for heading, width in (("stage", 8), ("state", 7), ("time", 5)):  # what follows them does not move
            table.add_column(heading, no_wrap=True, min_width=width)
        table.add_column("")
        for stage, (state, detail) in self.rows.items():
            shown = self.spinner if state == "running" else Text(state, style=COLOURS[state])
            style = "dim" if state == "running" else ""
            # The progress of a training has two parts, of which each fits into a line of 80 columns.
            table.add_row(stage, shown, self._elapsed(stage), Text(detail.replace("; ", "\n"), style=style))
        return table
