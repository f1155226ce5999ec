"""`gru clean`: what it finds and removes, with a real registry and a real database of workflows."""

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from gru import storage
from gru.config import PipelineConfig, TokenizerConfig
from gru.corpus.tokenizer import train_tokenizer
from gru.registry import tracking, versions
from gru.registry.lineage import Lineage
from jobs import stages
from pipelines import clean, cli, ray_sessions
from pipelines.clean import DAY, Row, find, find_cached
from pipelines.needs import Needs
from tests.gru.registry import bundles

ROOT = Path(__file__).parents[2]
D1, D2, D3, D4 = (f"{number:016x}" for number in range(1, 5))
R1, R2, R3, R4 = (f"{number:016x}" for number in range(11, 15))
STEP = "step-{:09d}-0000aa"


def write(path: Path, content: object = "x" * 1000) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def dataset(store: Path, key: str, digest: str) -> Path:
    directory = store / "datasets" / key
    write(directory / "train-00000.parquet")
    write(directory / "manifest.json", {"digest": digest})
    write(directory / "result.json", {"dataset": str(directory)})
    return directory


def training(store: Path, key: str, digest: str, steps: Iterable[int], mlflow_run: str | None = None) -> Path:
    """Write a run; with the id of an MLflow run it is finished."""
    directory = store / "runs" / key
    for step in steps:
        state = {"identity": {"dataset": digest}, "heldout_loss": abs(step - 20.0)}
        write(directory / STEP.format(step) / "state.json", state)
        write(directory / STEP.format(step) / "digests.json", {})
    if mlflow_run:
        write(directory / "result.json", {"run": mlflow_run})
        write(directory / "bundle" / "lineage.json", {"dataset_digest": digest})
    return directory


def age(directory: Path, days: float) -> None:
    for path in directory.rglob("*"):
        os.utime(path, times=(time.time() - days * DAY,) * 2)


def found(store: Path, needs: Needs, days: float = 1, with_lineage: bool = False) -> dict[str, Row]:
    return {row.name: row for row in find(str(store), needs, days, with_lineage).rows}


def test_what_nothing_needs_is_found_with_its_reason(tmp_path: Path) -> None:
    dataset(tmp_path, D1, "one")
    dataset(tmp_path, D2, "two")
    dataset(tmp_path, D3, "three")
    write(tmp_path / "datasets" / D4 / "parts" / "draft-00000.json", {})
    write(tmp_path / "datasets" / "mine" / "notes.txt")
    training(tmp_path, R1, "two", [10])
    training(tmp_path, R2, "three", [10])
    write(tmp_path / "logs" / f"train-{R2}.log")
    write(tmp_path / "logs" / "app" / "customers.csv")
    age(tmp_path, 40)
    assert [*found(tmp_path, Needs(datasets={D1: "a workflow"}, runs={R1: "a workflow"}))] == [
        f"runs/{R2}",
        f"datasets/{D3}",
        f"datasets/{D4}",
        "logs: 1 file",
    ], "the dataset of a run that stays does, too"
    assert [*found(tmp_path, Needs(), days=50)] == []
    assert [*found(tmp_path, Needs(unknown=["a workflow has just begun"]))] == ["logs: 1 file"]
    rows = found(tmp_path, Needs())
    assert {row.reason for row in rows.values()} == {
        "no registered version and no newest run needs it",
        "unfinished, and no workflow is recorded that resumes it",
        "not written for 30 days",
    }
    assert rows[f"datasets/{D4}"].reason == "unfinished, and no workflow is recorded that resumes it"


def test_a_finished_training_keeps_its_last_its_best_and_its_registered_checkpoint(tmp_path: Path) -> None:
    run = training(tmp_path, R1, "one", [5, 10, 20, 30, 40], "mlflow-run")
    training(tmp_path, R2, "one", [5, 10, 20, 30, 40])
    age(tmp_path, 2)
    needs = Needs(tracked={"mlflow-run": "a version"}, checkpoints={STEP.format(5)}, runs={R2: "a workflow"})
    [row] = found(tmp_path, needs).values()
    assert row.name == f"runs/{R1}: 2 checkpoints"
    assert row.size == sum(path.stat().st_size for step in (10, 30) for path in (run / STEP.format(step)).iterdir())
    assert clean.remove(row)
    assert sorted(path.name for path in run.glob("step-*")) == [STEP.format(step) for step in (5, 20, 40)]


def test_what_killed_processes_left_is_found_where_it_lies(tmp_path: Path) -> None:
    draft = f".state.json.{'0' * 32}.tmp"
    run = training(tmp_path, R1, "one", [10])
    write(run / STEP.format(10) / draft)
    write(tmp_path / ".writable-123")
    write(dataset(tmp_path, D1, "one") / "parts" / "train-00000.parquet")
    age(tmp_path, 2)
    write(run / STEP.format(10) / f".digests.json.{'1' * 32}.tmp")  # being written
    rows = found(tmp_path, Needs(runs={R1: "a workflow"}))
    assert [*rows] == [f"runs/{R1}: 1 file", f"datasets/{D1}/parts", "storage: 1 file"]
    assert all(clean.remove(row) for row in rows.values())
    assert not (run / STEP.format(10) / draft).exists() and not (tmp_path / ".writable-123").exists()
    assert found(tmp_path, Needs(runs={R1: "a workflow"})) == {}


def test_copies_of_initial_models_stay_while_a_workflow_starts_from_them(tmp_path: Path) -> None:
    for key in (D1, D2):
        write(tmp_path / "initial" / key / "weights.safetensors")
    age(tmp_path, 2)
    needs = Needs()
    needs.add_paths(json.dumps({"tokenizer": {"path": f"{tmp_path}/initial/{D1}/tokenizer.json"}}), "a workflow")
    [row] = found(tmp_path, needs).values()
    assert (row.name, row.reason) == (f"initial/{D2}", "a copy of a model from which runs started")


def test_a_removal_that_is_interrupted_leaves_unfinished_things(tmp_path: Path) -> None:
    directory = dataset(tmp_path, D1, "one")
    age(tmp_path, 2)
    [row] = found(tmp_path, Needs()).values()
    names = [path.removeprefix(f"{directory}").lstrip("/") for path in row.paths]
    assert names == ["result.json", "manifest.json", ""]
    storage.remove(row.paths[0])
    storage.remove(row.paths[1])
    age(tmp_path, 2)
    [row] = found(tmp_path, Needs()).values()
    assert row.reason == "unfinished, and no workflow is recorded that resumes it"
    assert clean.remove(row) and not directory.exists()


def test_an_object_store_is_looked_through_like_a_directory() -> None:
    store = "memory://clean-test"
    for name in ("result.json", "manifest.json", "train-00000.parquet"):
        storage.write_bytes(f"{store}/datasets/{D1}/{name}", b"{}")
    assert find(store, Needs(), 1, False).rows == []
    later = time.time() + 2 * DAY
    [row] = find(store, Needs(), 1, False, later).rows
    assert (row.name, row.size) == (f"datasets/{D1}", 6)
    assert clean.remove(row) and storage.files(store) == []


def test_the_cache_loses_what_was_not_used_for_long(tmp_path: Path) -> None:
    for name in (f"gru_cpu-{D1}.so", f"decoder-{D2}.so", f"loss-{D3}.999", f"served/{D4}/m/champion.json", "other"):
        write(tmp_path / name)
    age(tmp_path, 40)
    os.utime(tmp_path / f"decoder-{D2}.so")
    assert [row.name for row in find_cached(tmp_path, 1).rows] == [
        "cache: compiled code: 1 file",
        "cache: unfinished files: 1 file",
    ]
    age(tmp_path, 200)
    assert f"cache: champions of registry {D4}" in [row.name for row in find_cached(tmp_path, 1).rows]


def test_of_rays_directories_those_go_that_an_embedded_one_of_this_user_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A marked one stays while a process is in it, names it or has a file of it open."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    child = subprocess.Popen(["true"])
    child.wait()
    write(tmp_path / "kept" / "file")

    def session(name: str, process: int = child.pid, marked: bool = True) -> Path:
        directory = tmp_path / "ray" / f"session_{name}_{process}"
        write(directory / "logs" / "raylet.out")
        (directory / "link").symlink_to(tmp_path / "kept")
        if marked:
            write(directory / ray_sessions.MARKER, "/x/store")
        return directory

    ended, inside, named, opened = (session(name) for name in ("ended", "inside", "named", "opened"))
    session("foreign", marked=False)
    session("alive", os.getpid())
    others = session("others")
    if os.geteuid() == 0:
        os.chown(others / ray_sessions.MARKER, 1, 1)
    else:
        (others / ray_sessions.MARKER).unlink()
    (tmp_path / "ray" / "session_latest").symlink_to(ended)
    age(tmp_path / "ray", 2)
    sleep = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with (
        (opened / "logs" / "raylet.out").open(),
        subprocess.Popen(sleep, cwd=inside, **pipes) as one,
        subprocess.Popen([*sleep, f"--session-dir={named}"], **pipes) as two,
    ):
        assert [process.stdout and process.stdout.readline() for process in (one, two)] == [b"\n"] * 2
        [row] = clean.find_ray_sessions(1).rows
        assert (row.paths[-1], row.size) == (str(ended), 1000 + len("/x/store"))
        assert (row.name, row.reason) == (f"ray/{ended.name}"[:31], "the embedded Ray of store has ended")
        assert clean.find_ray_sessions(3).rows == []
    assert row.paths[-2:] == (str(ended / "logs"), str(ended)), "the marker is removed last"
    assert clean.remove(row) and not ended.exists() and (tmp_path / "kept" / "file").exists()
    assert {each.paths[-1] for each in clean.find_ray_sessions(1).rows} == {str(inside), str(named), str(opened)}


def test_a_config_keeps_what_it_names_by_path() -> None:
    needs = Needs()
    needs.add_paths(
        f'{{"path": "/s/datasets/{D1}/tokenizer.json", "from": "s3://b/runs/{R1}/{STEP.format(5)}"}}', "run"
    )
    assert (needs.datasets, needs.runs, needs.checkpoints) == ({D1: "run"}, {R1: "run"}, {STEP.format(5)})


CONFIG = """
name = "notes"
storage = "{storage}"
corpus.sources = ["{source}"]
train.steps = {steps}
"""
RUN = """
import os, sys
from pathlib import Path
from jobs import entry
from pipelines import database, workflow
from pipelines.context import WorkflowContext

class Killed:
    def run(self, *arguments): os._exit(9)

config = entry.load_config(sys.argv[1], [])
context = WorkflowContext(Killed(), Path(config.storage), lambda *line: None)
workflow.execute(config, context, database.address(config.storage))
"""


def prepared(config: PipelineConfig) -> stages.Stage[stages.PrepareResult]:
    """The stage `prepare` of a config, whose result is written."""
    stage = stages.prepare_stage(config)
    dataset(Path(config.storage), stage.key, stage.key)
    counts = dict.fromkeys(("documents", "bytes", "tokens", "dropped", "vocabulary", "shards"), 1)
    about = {"stage": "prepare", "key": stage.key, "dataset": stage.directory, "digest": stage.key}
    rest = {"heldout_digest": "h", "heldout_by": "hash", "reasons": {}, "dropped_bytes": {}, "passed_over": {}}
    write(Path(stage.path), {**counts, **about, **rest, "seconds": 1.0})
    return stage


def test_workflows_and_registered_versions_keep_what_they_need(
    tmp_path: Path, mlflow_store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from jobs import entry

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    store = tmp_path / "store"
    (tmp_path / "a.txt").write_text("A crow met a fox. " * 99)
    (tmp_path / "c.toml").write_text(CONFIG.format(storage=store, source=tmp_path / "a.txt", steps=100))
    config = entry.load_config(str(tmp_path / "c.toml"), [])
    stage = prepared(config)
    running = stages.train_stage(config, stage.require()).key
    training(store, running, stage.key, [10])
    command = [sys.executable, "-c", RUN, str(tmp_path / "c.toml")]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == 9, killed.stderr
    tokenizer = train_tokenizer(TokenizerConfig(kind="char"), ["A crow met a fox."])
    run = tracking.open_run("test", "key", "promote")
    for seed, key in ((1, R1), (2, R2)):
        training(store, key, key, [10, 20, 30], "none")
        dataset(store, key, key)
        lineage = Lineage(
            **{
                **bundles.LINEAGE.model_dump(),
                "checkpoint": f"/elsewhere/runs/{key}/{STEP.format(10)}",
                "dataset": f"/elsewhere/datasets/{key}",
            }
        )
        path = bundles.write(store / "runs" / key / "bundle", tokenizer, seed, lineage)
        versions.promote(versions.register(run, "notes", path, 3.0 - seed, "text"), lambda champion: 0.0)
    training(store, R3, D3, [10], "none")
    dataset(store, D3, D3)
    age(store, 2)

    def gru_clean(*options: str) -> str:
        arguments = cli.build_parser().parse_args(["clean", str(store), *options])
        arguments.command(arguments)
        return capsys.readouterr().out

    with (store / "locks" / "jobs").open("w") as by_hand:
        fcntl.flock(by_hand, fcntl.LOCK_SH)
        listed = gru_clean("--dry-run")
    assert "datasets and runs stay: a job that was started by hand is in progress" in listed
    assert f"runs/{R3} " not in listed and f"datasets/{D3} " not in listed
    listed = gru_clean("--dry-run")
    assert f"runs/{R3} " in listed and f"datasets/{D3} " in listed
    assert f"runs/{running}" not in listed and stage.key not in listed
    assert "removed" in gru_clean("--yes")
    assert sorted(path.name for path in (store / "runs").iterdir()) == sorted([running, R1, R2])
    assert sorted(path.name for path in (store / "datasets").iterdir()) == sorted([stage.key, R1, R2])
    assert "nothing can be removed" in gru_clean("--yes")
    assert "removed" in gru_clean("--yes", "--lineage")
    assert sorted(path.name for path in (store / "runs").iterdir()) == sorted([running, R2]), (
        "the champion is version 2"
    )
    assert sorted(path.name for path in (store / "datasets").iterdir()) == sorted([stage.key, R2])
