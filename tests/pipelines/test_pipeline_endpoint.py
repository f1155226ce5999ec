"""The services of a pipeline that is up: its endpoint, and its Ray, which takes jobs.

These tests follow those of test_pipeline.py, since the last one registers a second version.
"""

import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import httpx
import mlflow
import openai
import psutil
import pytest

from pipelines import embedded
from tests.pipelines.pipeline import GRU, ROOT, Pipeline
from tests.waiting import wait_until


def test_the_openai_client_gets_the_same_text_whole_and_streamed(pipeline: Pipeline) -> None:
    client = openai.OpenAI(base_url=f"{pipeline.endpoint}/v1", api_key="none")
    [model] = client.models.list().data
    assert model.id == "fables"
    request = {"model": "fables", "prompt": "The fox and the ", "max_tokens": 2000, "temperature": 0.7, "seed": 5}
    request["extra_body"] = {"ignore_eos": True}  # a short text may be over before the first chunk is sent
    whole = client.completions.create(**request)
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 2000
    streamed = list(client.completions.create(**request, stream=True))
    assert len(streamed) > 1
    assert "".join(chunk.choices[0].text for chunk in streamed) == whole.choices[0].text
    stopped = client.completions.create(**request, stop=["."], n=3)
    assert [choice.finish_reason for choice in stopped.choices] == ["stop"] * 3
    assert all("." not in choice.text for choice in stopped.choices)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(**{**request, "model": "other"})


def test_gru_generate_prints_the_same_text_from_endpoint_registry_and_run(pipeline: Pipeline) -> None:
    [run] = pipeline.storage.glob("runs/*/bundle")
    texts = {}
    for model in (pipeline.config, "fables@champion", "fables:1", str(run.parent)):
        command = [*GRU, "generate", model, "The crow", "--tokens=20", "--seed=1", f"--storage={pipeline.storage}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        texts[done.stderr] = done.stdout
    assert len(set(texts.values())) == 1 and done.stdout.startswith("The crow")
    assert list(texts) == [
        f"fables version 1 from {pipeline.endpoint}, seed 1\n",
        f"fables version 1 from {pipeline.tracking}, seed 1\n",
        f"the bundle {run}, seed 1\n",
    ]


def test_headers_are_limited_before_they_cost_anything(pipeline: Pipeline) -> None:
    refused = httpx.get(pipeline.endpoint, headers={"x": "a" * 70_000})
    assert refused.status_code == 431 and refused.json()["error"]["type"] == "invalid_request_error"
    latin = httpx.get(pipeline.endpoint, headers={"x-session-id": b"caf\xe9", "x-request-id": b"caf\xe9"})
    assert latin.status_code == 200
    assert "gru_model_info" in httpx.get(f"{pipeline.endpoint}/metrics").text


def test_status_tells_what_the_endpoint_serves(pipeline: Pipeline) -> None:
    [endpoint] = pipeline.status("endpoints")
    [model] = endpoint.pop("models")
    assert endpoint.pop("tokens_per_second") >= 0
    assert endpoint == {"url": pipeline.endpoint, "problem": None, "replicas": 1, "running": 0, "waiting": 0}
    assert (model["name"], model["version"], model["alias"]) == ("fables", "1", "champion")
    assert pipeline.storage.stat().st_ctime - 86400 < model["since"] <= time.time()
    shown = subprocess.run([*GRU, "status", str(pipeline.storage)], capture_output=True, text=True, check=True).stdout
    assert f"endpoint: {pipeline.endpoint}: 1 replica, " in shown and "fables@champion is version 1 since " in shown


def test_the_access_log_is_a_file_of_its_own(pipeline: Pipeline) -> None:
    httpx.get(f"{pipeline.endpoint}/v1/models", headers={"x-request-id": "look-for-this"})
    files = {file.path for process in pipeline.service_processes() for file in process.open_files()}
    [log] = [file for file in files if Path(file).name.startswith("access_")]
    assert Path(log).parent.parts[-2:] == ("logs", "serve")
    lines = [json.loads(line) for line in Path(log).read_text().splitlines()]
    [line] = [line for line in lines if line.get("request") == "look-for-this"]
    assert (line["path"], line["status"]) == ("/v1/models", 200)


def test_a_full_machine_does_not_end_the_endpoint_for_being_of_ray(pipeline: Pipeline) -> None:
    adjustments = {Path(f"/proc/{process.pid}/oom_score_adj").read_text() for process in pipeline.service_processes()}
    assert adjustments == {Path("/proc/self/oom_score_adj").read_text()}
    [raylet] = [process for process in pipeline.service_processes() if process.name() == "raylet"]
    assert raylet.environ()["RAY_memory_monitor_refresh_ms"] == "0"


def test_only_the_loopback_address_is_bound(pipeline: Pipeline) -> None:
    listening = [
        connection.laddr.ip
        for process in pipeline.service_processes()
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening
    assert set(listening) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_a_submitted_job_ends_with_its_result_as_the_last_line(pipeline: Pipeline) -> None:
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(pipeline.storage / "embedded" / "ray-token"),
    }
    ray = str(Path(sys.executable).with_name("ray"))
    job = ["-m", "jobs.prepare", pipeline.config]
    command = [
        ray,
        "job",
        "submit",
        f"--address=http://127.0.0.1:{pipeline.ray_port}",
        "--working-dir=.",
        "--",
        "python",
    ]
    done = subprocess.run([*command, *job], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout + done.stderr
    [result] = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert result["stage"] == "prepare"
    refused = subprocess.run(
        [*command, *job], cwd=ROOT, env={**environment, "RAY_AUTH_TOKEN_PATH": "/dev/null"}, capture_output=True
    )
    assert refused.returncode != 0


def test_a_better_version_takes_over_and_is_rolled_back(pipeline: Pipeline) -> None:
    """It starts from the first one. The endpoint follows @champion without a restart. A stage whose job was killed gets
    a second attempt."""
    changes = ["--set", "train.init_from=@champion", "--set", f"train.steps={pipeline.steps + 100}"]
    longer = [*pipeline.command, *changes, "--exit"]
    running = subprocess.Popen(
        longer, cwd=pipeline.directory, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_until("the job", lambda: pipeline.job_processes("train"))[0].kill()
    out, err = running.communicate()
    assert running.returncode == 0, err
    result = json.loads(out.splitlines()[-1])
    assert f"{pipeline.steps + 100} steps from fables:1, held-out" in err
    assert result["version"] == "2"
    [*_, workflow] = pipeline.status()
    assert [(stage["name"], stage["attempts"]) for stage in workflow["stages"]][1] == ("train", 2)

    def served() -> str:
        with urllib.request.urlopen(f"{pipeline.endpoint}/v1/models") as response:
            return json.load(response)["data"][0]["version"]

    assert served() == ("2" if result["promoted"] else "1")
    client = mlflow.MlflowClient(pipeline.tracking)
    client.set_registered_model_alias("fables", "champion", "2")
    wait_until("version 2", lambda: served() == "2", 30)
    rollback = subprocess.run([*GRU, "rollback", pipeline.config], capture_output=True, text=True)
    assert rollback.returncode == 0, rollback.stderr
    wait_until("version 1", lambda: served() == "1", 30)


def test_an_mlflow_that_ended_is_started_again_with_the_same_users(pipeline: Pipeline) -> None:
    [_, mlflow_service] = embedded.services(pipeline.storage / embedded.DIRECTORY)
    for process in mlflow_service.processes():
        process.kill()
    wait_until("MLflow again", lambda: "MLflow had ended; it is up again" in pipeline.stderr, 60)
    assert mlflow.MlflowClient(pipeline.tracking).get_experiment_by_name("fables")
    assert pipeline.process and pipeline.process.pid in [
        user[0] for user in json.loads(mlflow_service.record.read_text())["users"]
    ]
