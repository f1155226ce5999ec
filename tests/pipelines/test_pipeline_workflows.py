"""Commands beside a pipeline that is up: status, schedule and lineage; and how it stops.

These tests follow those of test_pipeline_endpoint.py, and the last one stops the pipeline.
"""

import contextlib
import json
import signal
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import openai
import psutil
import pytest

from gru.corpus.dataset import open_dataset
from gru.registry.origins import database_origins, server_origins
from tests.pipelines.pipeline import GRU, Pipeline


def test_status_shows_the_stages_of_each_workflow(pipeline: Pipeline) -> None:
    workflow, *_ = pipeline.status()
    assert workflow["state"] == "done"
    assert [stage["name"] for stage in workflow["stages"]] == ["prepare", "train", "evaluate", "promote", "serve"]
    assert {stage["state"] for stage in workflow["stages"]} == {"done"}
    assert sum(stage["seconds"] for stage in workflow["stages"]) <= workflow["seconds"]
    assert all(Path(stage["log"]).exists() for stage in workflow["stages"][:4])
    shown = subprocess.run([*GRU, "status", str(pipeline.storage)], capture_output=True, text=True, check=True).stdout
    assert workflow["id"] in shown and str(pipeline.storage / "logs") in shown
    missing = subprocess.run([*GRU, "status", str(pipeline.directory)], capture_output=True, text=True)
    assert missing.returncode == 2
    assert missing.stderr == f"error: {pipeline.directory}: no workflow has run with this storage\n"


def test_a_schedule_repeats_what_run_does(pipeline: Pipeline) -> None:
    """Nothing is new in the sources, so each run is that of the champion, and trains no other one from it."""
    changes = ["--set", "train.init_from=@champion"]
    command = [*GRU, "schedule", pipeline.config, "--cron", "* * * * * */5", *pipeline.ports, *changes]
    with subprocess.Popen(
        command, cwd=pipeline.directory, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        results = [json.loads(process.stdout.readline()) for _ in range(2)]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert [result["bits_per_byte"] for result in results] == [pipeline.result["bits_per_byte"]] * 2
    with urllib.request.urlopen(f"{pipeline.endpoint}/ready") as response:
        assert response.status == 200, "services that another process uses keep running"
    wrong = subprocess.run([*command[:4], "soon"], capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.startswith('error: --cron "soon": expected minute, hour')


def test_lineage_leads_from_the_model_to_its_sources(pipeline: Pipeline) -> None:
    command = [*GRU, "lineage", "fables:1", "--verify", f"--storage={pipeline.storage}"]

    def states() -> tuple[int, dict[str, str]]:
        done = subprocess.run([*command, "--json"], capture_output=True, text=True)
        return done.returncode, {link["name"]: link["state"] for link in json.loads(done.stdout)}

    read = ("bundle", "checkpoint", "dataset", "tokenizer", "sources")
    whole = {"version": "found", "run": "found", **dict.fromkeys(read, "verified")}
    assert states() == (0, whole)
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert str(pipeline.corpus) in shown and "fables:1: version 1" in shown
    dataset = Path(pipeline.result["dataset"])
    shard = next(dataset.glob("train-*.parquet"))
    data = shard.read_bytes()
    shard.write_bytes(data[:-100] + bytes([data[-100] ^ 1]) + data[-99:])
    assert states() == (1, whole | {"dataset": "different"})
    shard.write_bytes(data)
    away = dataset.rename(pipeline.directory / "away")
    assert states() == (0, whole | {"dataset": "absent", "sources": "absent"})
    away.rename(dataset)
    second = subprocess.run([*GRU, "lineage", "fables:2", command[-1]], capture_output=True, text=True, check=True)
    assert "started from fables:1 (" in second.stdout
    missing = subprocess.run([*GRU, "lineage", "fables@best", command[-1]], capture_output=True, text=True)
    assert (missing.returncode, missing.stderr) == (2, "error: fables@best: no version of a model 'fables' is @best\n")


def test_clean_keeps_the_lineage_beside_a_pipeline_that_is_up(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(pipeline.directory))
    command = [*GRU, "clean", str(pipeline.storage), "--older-than=0", "--yes"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "stays: " in done.stdout
    verify = [*GRU, "lineage", "fables:1", "--verify", f"--storage={pipeline.storage}", "--json"]
    links = json.loads(subprocess.run(verify, capture_output=True, text=True, check=True).stdout)
    assert "absent" not in {link["state"] for link in links}
    before = mlflow.get_tracking_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", pipeline.tracking)  # MLflow sets it too, for all tests that follow
    mlflow.set_tracking_uri(pipeline.tracking)
    assert database_origins(pipeline.storage / "mlflow") == server_origins() != []
    mlflow.set_tracking_uri(before)


def test_a_mistake_that_only_a_stage_can_find_is_reported_in_one_line(pipeline: Pipeline) -> None:
    command = [*pipeline.command, "--set", "train.sequence_length=1000000", "--exit"]
    done = subprocess.run(command, cwd=pipeline.directory, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: the corpus has ")
    assert "train.sequence_length = 1000000" in done.stderr
    train = pipeline.status()[-1]["stages"][1]
    assert (train["state"], train["problem"]) == ("failed", done.stderr.splitlines()[-1].removeprefix("error: "))
    assert Path(train["log"]).exists()


@contextlib.contextmanager
def answers_in_progress(pipeline: Pipeline) -> Iterator[list[list[str]]]:
    """Request four answers of eight texts, which take seconds. Yields a list that has the finish reasons at the end."""
    client = openai.OpenAI(base_url=f"{pipeline.endpoint}/v1", api_key="none")
    no_end_of_text = {str(open_dataset(pipeline.result["dataset"]).manifest.end_of_text): -100}
    request = {"model": "fables", "prompt": "A ", "max_tokens": 1000, "n": 8, "logit_bias": no_end_of_text}
    streams = [client.completions.create(**request, stream=True) for _ in range(4)]
    finished: list[list[str]] = []

    def read(stream: openai.Stream[Any]) -> None:
        reasons = [choice.finish_reason for chunk in stream for choice in chunk.choices]
        finished.append([reason for reason in reasons if reason])

    readers = [threading.Thread(target=read, args=(stream,), daemon=True) for stream in streams]
    for reader in readers:
        reader.start()
    yield finished
    for reader in readers:
        reader.join(10)
        assert not reader.is_alive()


def test_stopping_finishes_answers_and_all_processes_and_the_next_run_resumes(pipeline: Pipeline) -> None:
    assert pipeline.process is not None
    processes = pipeline.service_processes()
    assert len(processes) > 5
    with answers_in_progress(pipeline) as finished:
        pipeline.process.send_signal(signal.SIGTERM)  # as Ctrl-C
        assert pipeline.process.wait(60) == 130
    assert "to finish, at most" in pipeline.stderr
    assert finished == [["length"] * 8] * 4
    alive = [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert not alive
    done = subprocess.run([*pipeline.command, "--exit"], cwd=pipeline.directory, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for stage in ("prepare", "train", "evaluate", "promote"):
        assert f"{stage:9} cached" in done.stderr
    again = json.loads(done.stdout.splitlines()[-1])
    assert {k: again[k] for k in ("version", "bits_per_byte", "sample")} == {
        k: pipeline.result[k] for k in ("version", "bits_per_byte", "sample")
    }
    assert not list(pipeline.storage.glob("embedded/*.json")), "--exit stops the services too"
