"""Small comparisons, started as a user starts them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlflow
import pytest
import ray

from gru.comparison.contenders import DEFAULTS
from gru.comparison.page import HELDOUT
from gru.comparison.trial import MEASUREMENTS
from gru.registry.bundle import load_bundle

CONFIG = """
name = "test"
storage = "store"
[corpus]
sources = ["fables.jsonl"]
heldout_share = 0.05
template = "{title}\\n{text}"
[tokenizer]
kind = "byte"
[model]
embedding = 32
hidden = 32
[train]
batch_size = 16
sequence_length = 32
threads = 1
heldout_tokens = 100_000  # all of them, so that training measures the text that is scored at the end
[evaluate]
heldout_bytes = 100_000
"""


@pytest.fixture(scope="module")
def prepared(fables: Path, ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a config and its prepared dataset."""
    directory = tmp_path_factory.mktemp("compare")
    (directory / "fables.jsonl").write_bytes(fables.read_bytes())
    (directory / "config.toml").write_text(CONFIG)
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    environment.pop("MLFLOW_TRACKING_URI", None)
    command = [sys.executable, "-m", "jobs.prepare", "config.toml"]
    subprocess.run(command, cwd=directory, env=environment, check=True, capture_output=True)
    return directory


def start(directory: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "jobs.compare", "config.toml", *arguments]
    return subprocess.Popen(command, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def compare(directory: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    process = start(directory, *arguments)
    out, err = process.communicate()
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1]), err


def records(directory: Path) -> dict[str, int]:
    """Modification times of the finished trials' records, by path."""
    return {str(path): path.stat().st_mtime_ns for path in directory.glob("store/comparisons/*/*.json")}


def test_all_contenders_are_compared_and_their_records_are_stored(
    prepared: Path, mlflow_store: str, tmp_path: Path
) -> None:
    result, log = compare(prepared, "--seconds", "1.5", "--seeds", "1", "--page", "page.html")
    rows = result["contenders"]
    assert list(rows) == list(DEFAULTS)
    for name, row in rows.items():
        assert row["parameters"] == pytest.approx(rows["gru"]["parameters"], rel=0.05), name
        # On a busy machine one step may pass several measurements.
        assert row["quarters"][3]["bits_per_byte"] <= row["quarters"][0]["bits_per_byte"] < 8.5, name
        assert row["end"]["bits_per_byte"] == pytest.approx(row["quarters"][3]["bits_per_byte"], rel=0.1), name
    assert rows["gru"]["state_bytes"] == {"1000": 32 * 4, "10000": 32 * 4}
    caches = rows["transformer"]["state_bytes"]
    assert caches["10000"] == 10 * caches["1000"]
    assert len(result["gru_beats_transformer"]) == MEASUREMENTS
    for name in DEFAULTS:
        assert f"compare: | {name} | {rows[name]['parameters']:,} |" in log
    assert "gru is better than the transformer at " in log
    bundles = {path.name.partition("-")[0]: load_bundle(path) for path in (prepared / result["records"]).glob("*-0/")}
    assert set(bundles) == set(DEFAULTS) - {"transformer"}
    for name, bundle in bundles.items():
        assert sum(parameter.numel() for parameter in bundle.model.parameters()) == rows[name]["parameters"]

    page = (prepared / "page.html").read_text()
    assert f"open {prepared / 'page.html'} in a browser" in log and result["page"] == str(prepared / "page.html")
    assert {f'"author": "{name}"' in page for name in [*bundles, HELDOUT]} == {True}

    client = mlflow.MlflowClient()
    artifacts = {file.path for file in client.list_artifacts(result["run"])}
    assert artifacts == {"table.md", "comparison.json", "comparison.png", "comparison.svg"}
    picture = Path(client.download_artifacts(result["run"], "comparison.png", str(tmp_path)))
    assert picture.read_bytes().startswith(b"\x89PNG")
    parent = client.get_run(result["run"])
    children = client.search_runs(
        [parent.info.experiment_id], f"tags.mlflow.parentRunId = '{result['run']}'", order_by=["start_time"]
    )
    assert [child.info.run_name for child in children] == [f"{name}, seed 0" for name in DEFAULTS]
    assert {run.info.status for run in [parent, *children]} == {"FINISHED"}
    for child in children:
        assert len(client.get_metric_history(child.info.run_id, "heldout/loss")) <= MEASUREMENTS
        history = client.get_metric_history(child.info.run_id, "train/loss")
        assert len({point.step for point in history}) == len(history)
        assert history[-1].value <= history[0].value
        assert child.data.metrics["tokens_per_second"] > 0


@pytest.mark.faults
def test_a_killed_comparison_resumes_with_the_next_trial(prepared: Path, mlflow_store: str) -> None:
    arguments = ["--seconds", "3", "--seeds", "2", "--contender", "gru", "--contender", "slow:train.learning_rate=1e-5"]
    before = records(prepared)
    process = start(prepared, *arguments)
    deadline = time.monotonic() + 120
    while len(records(prepared)) < len(before) + 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {name: at for name, at in records(prepared).items() if name not in before}
    assert len(finished) == 2
    result, log = compare(prepared, *arguments)
    assert log.count("done already") == 2
    assert log.count("training for") == 2
    after = records(prepared)
    assert {name: after[name] for name in finished} == finished
    rows = result["contenders"]
    assert [row["seeds"] for row in rows.values()] == [2, 2]
    assert rows["gru"]["end"]["bits_per_byte"] < rows["slow"]["end"]["bits_per_byte"]
    assert "gru_beats_transformer" not in result
    client = mlflow.MlflowClient()
    experiment = client.get_run(result["run"]).info.experiment_id
    children = client.search_runs([experiment], f"tags.mlflow.parentRunId = '{result['run']}'")
    assert sorted(child.info.run_name or "" for child in children) == [
        f"{name}, seed {seed}" for name in ("gru", "slow") for seed in range(2)
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--contender", "gpt"],
            "error: --contender gpt: unknown: expected one of gru, lstm, rnn, mingru, transformer",
        ),
        (["--contender", "a:train.stpes=1"], "error: --contender a: train.stpes: unknown key; known here: "),
        (["--contender", "gru", "--contender", "gru"], "error: --contender gru: given twice"),
        (["--set", "train.sequence_length=20000"], "error: the corpus has "),
        (["--page", "p.html", "--contender", "transformer"], "error: --page p.html: needs a recurrent contender"),
        (["--page", "absent/page.html"], "error: --page absent/page.html: its directory does not exist"),
    ],
)
def test_a_mistake_is_one_line(prepared: Path, mlflow_store: str, arguments: list[str], message: str) -> None:
    process = start(prepared, *arguments)
    out, err = process.communicate()
    assert (process.returncode, out) == (2, ""), err
    [line] = err.splitlines()
    assert line.startswith(message)
