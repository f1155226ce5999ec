"""The cost of checkpoints and workers, and the time to recover from a kill, of the quickstart preset.

python -m tests.benchmarks.training [--steps 700]

Rates are medians over the logged points of a run. Ratios compare runs of one call, one after the other.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from gru import config as configuration
from gru.config import TrainConfig
from gru.config_stages import TrainResources
from gru.corpus.dataset import Dataset
from gru.corpus.prepare import prepare
from gru.registry import tracking
from gru.training.trainer import train
from jobs import entry
from tests.benchmarks.encoding import show

PRESET = configuration.load(Path(__file__).parents[2] / "pipelines" / "configs" / "quickstart.toml")
SHORT = 120
"""Number of steps of runs that are compared with each other."""
WARM_UP = 4
"""Number of logged points at the start of a run that are ignored."""


class Bench:
    """Training runs on one dataset, each with a directory and an MLflow run of its own."""

    def __init__(self, dataset: Dataset, folder: Path, tracking_uri: str) -> None:
        self.dataset, self.folder, self.tracking = dataset, folder, tracking_uri
        self.number = 0

    def run(self, watch: Callable[[str], None] = lambda line: None, **changes: Any) -> tracking.Run:
        """Train with the preset's settings and these changes. watch: called with each progress line."""
        self.number += 1
        name = f"run{self.number}"
        settings = PRESET.train.model_dump() | {"heldout_steps": 1_000_000, "log_steps": 5} | changes
        run = tracking.open_run("bench", name, name)
        model, path = PRESET.model, str(self.folder / name)
        config = TrainConfig.model_validate(settings)
        train(model, config, TrainResources(), self.dataset, path, self.tracking, run.id, watch)
        return run

    def speed(self, **changes: Any) -> float:
        """Return the tokens/s of a run with these changes."""
        return statistics.median(history(self.run(steps=SHORT, **changes), "train/tokens_per_second"))


def history(run: tracking.Run, metric: str) -> list[float]:
    """Return the logged values of a metric after the warm-up."""
    return [value for _, value in run.history(metric)][WARM_UP:]


def waits(bench: Bench, steps: int) -> None:
    """Measure how long training waits for data and checkpoints, and its speed with many checkpoints."""
    run = bench.run(steps=steps)
    for what in ("data", "checkpoint"):
        share = statistics.mean(history(run, f"train/{what}_wait_share"))
        print(f"{f'waiting for {what}':28} {share:.2%} of the time")
    seconds = [value for _, value in run.history("train/checkpoint_seconds")]
    print(f"{'writing a checkpoint':28} {statistics.mean(seconds):.2f} s in the background, {len(seconds)} per run")
    frequent, never = bench.speed(checkpoint_steps=10), bench.speed(checkpoint_steps=SHORT)
    show("tokens/s", "a checkpoint every 10 steps", frequent, "none", never, 2)


def workers(bench: Bench) -> None:
    """Compare two workers with one, and bitwise elastic training with plain data parallelism."""
    two = {"workers": 2, "threads": 1}
    one = bench.speed(workers=1, threads=2)
    together, in_parts = bench.speed(**two), bench.speed(**two, bitwise_elastic=4)
    show("tokens/s", "2 workers of 1 thread", together, "1 worker of 2 threads", one, 2)
    show("", "bitwise_elastic = 4", in_parts, "plain data parallelism, 2 workers each", together, 2)


def recovery(bench: Bench) -> None:
    """Measure the time from kill -9 of one of two workers to the next new step."""
    times: dict[str, float] = {}
    killed_at: list[int] = []

    def watch(line: str) -> None:
        now = time.monotonic()
        step = int(line.split("/")[0].split()[1]) if line.startswith("step ") else 0
        if step >= 60 and "killed" not in times:
            killed_at.append(step)
            [*_, victim] = processes()
            times["killed"] = time.monotonic()
            victim.kill()
        elif "killed" in times and line.startswith("failure 1"):
            times["noticed"] = now
        elif "noticed" in times and step > killed_at[0]:
            times.setdefault("stepped", now)

    bench.run(watch, steps=SHORT, workers=2, threads=1, checkpoint_steps=20)
    noticed, stepped = (times[name] - times["killed"] for name in ("noticed", "stepped"))
    print(f"{'kill -9 to the next step':28} {stepped:.1f} s: {noticed:.1f} until it is noticed, then new processes")


def processes() -> list[psutil.Process]:
    """Return the training workers of this process."""
    return [p for p in psutil.Process().children(recursive=True) if p.cmdline()[:1] == ["ray::RayTrainWorker"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--steps",
        type=int,
        default=700,
        help="number of steps of the run whose waiting times are measured (default 700)",
    )
    arguments = parser.parse_args()
    entry.prepare_libraries()
    with tempfile.TemporaryDirectory(prefix="gru-bench-") as folder:
        uri = f"sqlite:///{folder}/mlflow.db"
        import mlflow

        mlflow.set_tracking_uri(uri)
        mlflow.MlflowClient().create_experiment("bench", artifact_location=f"{folder}/artifacts")
        entry.start_ray()
        dataset = prepare(PRESET.corpus, PRESET.tokenizer, f"{folder}/dataset", lambda line: None)
        bench = Bench(dataset, Path(folder), uri)
        waits(bench, arguments.steps)
        workers(bench)
        recovery(bench)


if __name__ == "__main__":
    main()
