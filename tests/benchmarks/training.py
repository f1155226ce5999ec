"""What keeping a training run safe costs, and how soon it goes on after a kill; the quickstart preset's model and text.

python -m tests.benchmarks.training [--steps 700]

Rates are medians over the points of a run, ratios are of runs of one call, one after the other.
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
from gru.config import TrainConfig, TrainResources
from gru.corpus.dataset import Dataset
from gru.corpus.prepare import prepare
from gru.registry import tracking
from gru.training.trainer import train
from jobs import entry
from tests.benchmarks.encoding import show

PRESET = configuration.load(Path(__file__).parents[2] / "pipelines" / "configs" / "quickstart.toml")
SHORT = 120
"""Steps of runs that are compared with each other."""
WARM_UP = 4
"""Points at the beginning that do not count."""


class Bench:
    def __init__(self, dataset: Dataset, folder: Path, tracking_uri: str) -> None:
        self.dataset, self.folder, self.tracking = dataset, folder, tracking_uri
        self.number = 0

    def run(self, watch: Callable[[str], None] = lambda line: None, **changes: Any) -> tracking.Run:
        """Train with the preset's settings and these; watch: called with each line for people."""
        self.number += 1
        name = f"run{self.number}"
        settings = PRESET.train.model_dump() | {"heldout_steps": 1_000_000, "log_steps": 5} | changes
        run = tracking.open_run("bench", name, name)
        model, path = PRESET.model, str(self.folder / name)
        config = TrainConfig.model_validate(settings)
        train(model, config, TrainResources(), self.dataset, path, self.tracking, run.id, watch)
        return run

    def speed(self, **changes: Any) -> float:
        """Tokens/s."""
        return statistics.median(history(self.run(steps=SHORT, **changes), "train/tokens_per_second"))


def history(run: tracking.Run, metric: str) -> list[float]:
    return [value for _, value in run.history(metric)][WARM_UP:]


def waits(bench: Bench, steps: int) -> None:
    run = bench.run(steps=steps)
    for what in ("data", "checkpoint"):
        share = statistics.mean(history(run, f"train/{what}_wait_share"))
        print(f"{f'waiting for {what}':28} {share:.2%} of the time")
    seconds = [value for _, value in run.history("train/checkpoint_seconds")]
    print(f"{'writing a checkpoint':28} {statistics.mean(seconds):.2f} s, beside training, {len(seconds)} in the run")
    often, never = bench.speed(checkpoint_steps=10), bench.speed(checkpoint_steps=SHORT)
    show("tokens/s", "a checkpoint every 10 steps", often, "none", never, 2)


def workers(bench: Bench) -> None:
    two = {"workers": 2, "threads": 1}
    one = bench.speed(workers=1, threads=2)
    together, in_parts = bench.speed(**two), bench.speed(**two, bitwise_elastic=4)
    show("tokens/s", "2 workers of 1 thread", together, "1 worker of 2 threads", one, 2)
    show("", "bitwise_elastic = 4", in_parts, "plain DDP, 2 workers each", together, 2)


def recovery(bench: Bench) -> None:
    """From kill -9 of one worker of two to the first logged step that is new."""
    seen: dict[str, float] = {}
    killed_at: list[int] = []

    def watch(line: str) -> None:
        now = time.monotonic()
        step = int(line.split("/")[0].split()[1]) if line.startswith("step ") else 0
        if step >= 60 and "killed" not in seen:
            killed_at.append(step)
            [*_, victim] = processes()
            seen["killed"] = time.monotonic()
            victim.kill()
        elif "killed" in seen and line.startswith("failure 1"):
            seen["noticed"] = now
        elif "noticed" in seen and step > killed_at[0]:
            seen.setdefault("stepped", now)

    bench.run(watch, steps=SHORT, workers=2, threads=1, checkpoint_steps=20)
    noticed, stepped = (seen[name] - seen["killed"] for name in ("noticed", "stepped"))
    print(f"{'kill -9 to the next step':28} {stepped:.1f} s: {noticed:.1f} until it is noticed, then new processes")


def processes() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if p.cmdline()[:1] == ["ray::RayTrainWorker"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=700, help="of the run whose waiting is measured")
    arguments = parser.parse_args()
    entry.quiet_libraries()
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
