"""The services of a pipeline that is up: its endpoint, and its Ray, which takes jobs.

These tests follow those of test_pipeline.py, since the last one registers a second version.
"""

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

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


def test_gru_generate_prints_the_endpoints_text(pipeline: Pipeline) -> None:
    command = [*GRU, "generate", pipeline.config, "The crow", "--max-tokens=20", "--seed=1"]
    texts = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert texts[0] == texts[1]
    assert texts[0].startswith("The crow")


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
    """The endpoint follows @champion without a restart. A stage whose job was killed gets a second attempt."""
    longer = [*pipeline.command, "--set", f"train.steps={pipeline.steps + 100}", "--exit"]
    running = subprocess.Popen(
        longer, cwd=pipeline.directory, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_until("the job", lambda: pipeline.job_processes("train"))[0].kill()
    out, err = running.communicate()
    assert running.returncode == 0, err
    result = json.loads(out.splitlines()[-1])
    assert "prepare   cached" in err
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
