"""Workflows that are killed with SIGKILL: in every stage, of two processes the one that executes it, and a sweep."""

import json
import subprocess

import mlflow
import pytest

from tests.pipelines.checks import assert_mlflow_has_each_step_once, assert_weights_are_those_of_training_alone
from tests.pipelines.pipeline import GRU, Pipeline
from tests.waiting import wait_until

pytestmark = pytest.mark.faults


def test_killed_in_every_stage_the_same_command_ends_with_the_weights_of_an_undisturbed_training(
    killed_pipeline: Pipeline,
) -> None:
    assert_weights_are_those_of_training_alone(killed_pipeline)
    assert killed_pipeline.result["bits_per_byte"] < 1.5


def test_after_all_kills_mlflow_has_each_step_once_and_the_right_status_of_every_run(killed_pipeline: Pipeline) -> None:
    assert_mlflow_has_each_step_once(killed_pipeline)


def test_of_two_processes_one_executes_the_workflow_and_cancel_stops_all_of_it(killed_pipeline: Pipeline) -> None:
    changes = ["--set", "train.steps=100000"]
    command = [*killed_pipeline.command, *changes, "--exit"]
    killed = subprocess.Popen(command, cwd=killed_pipeline.directory, stderr=subprocess.DEVNULL)
    wait_until("the job", lambda: killed_pipeline.job_processes("train"))
    follower_stderr = killed_pipeline.directory / "follower.txt"
    with follower_stderr.open("w") as err:
        running = subprocess.Popen(command, cwd=killed_pipeline.directory, stderr=err)
    wait_until("the second process to follow", lambda: "train     running" in follower_stderr.read_text())
    assert "in another process" in follower_stderr.read_text()
    killed.kill()
    killed.wait()
    wait_until("the second process to take over", lambda: " step " in follower_stderr.read_text())
    [*_, workflow] = killed_pipeline.status()
    assert workflow["state"] == "running"
    cancel = [*GRU, "cancel", killed_pipeline.config, *changes]
    done = subprocess.run(cancel, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == f"cancelled {workflow['id']}\n", done.stderr
    assert running.wait(timeout=60) == 1
    assert follower_stderr.read_text().splitlines()[-1].startswith("error: cancelled")
    assert not killed_pipeline.job_processes("train")
    assert killed_pipeline.status()[-1]["state"] == "cancelled"
    runs = mlflow.MlflowClient(killed_pipeline.tracking).search_runs(
        [mlflow.MlflowClient(killed_pipeline.tracking).get_experiment_by_name("fables").experiment_id]  # type: ignore[union-attr]
    )
    assert not [run for run in runs if run.info.status == "RUNNING"]
    again = subprocess.run(cancel, capture_output=True, text=True)
    assert (again.returncode, again.stderr) == (2, "error: no unfinished workflow of this config\n")


def test_a_killed_sweep_resumes_and_finds_the_best_trial(killed_pipeline: Pipeline) -> None:
    variants = ["--over", "train.steps=[20]", "--trial", "train.steps=200"]
    command = [*GRU, "sweep", killed_pipeline.config, *variants, "--at-once=2", *killed_pipeline.ports]
    killed = subprocess.Popen(command, cwd=killed_pipeline.directory, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    wait_until("both jobs", lambda: len(killed_pipeline.job_processes("train")) == 2)
    killed.kill()
    killed.wait()
    done = subprocess.run(command, cwd=killed_pipeline.directory, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["best"] == "train.steps=200"
    assert set(result["trials"]) == {"train.steps=20", "train.steps=200"}
    assert result["bits_per_byte"] == result["trials"]["train.steps=200"]["bits_per_byte"]
    assert "run best   gru run" in done.stderr and "--set train.steps=200" in done.stderr
    attempts = {stage["attempts"] for trial in killed_pipeline.status()[-2:] for stage in trial["stages"][1:]}
    assert attempts == {1}, "each job ran once"
    client = mlflow.MlflowClient(killed_pipeline.tracking)
    run_id = result["tracking"].rsplit("/", 1)[1].partition("?")[0]
    parent = client.get_run(run_id)
    below = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    trials = client.search_runs([parent.info.experiment_id], below)
    assert {run.info.run_name for run in trials} == set(result["trials"])
    assert {run.info.status for run in [parent, *trials]} == {"FINISHED"}
