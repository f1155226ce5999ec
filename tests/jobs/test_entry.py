"""The device of a job, the Ray that it starts, and its configuration."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from gru.config_fields import CHAT_TEMPLATE
from gru.config_stages import EvaluateResources, TrainResources
from gru.errors import UserError
from jobs import entry


def test_a_machine_without_the_configured_gpu_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"^resources\.evaluate\.gpus = 1: this machine has no GPU$"):
        entry.device("evaluate", EvaluateResources(gpus=1))
    assert entry.device("train", TrainResources()) == torch.device("cpu")


def test_a_gpu_is_used_only_if_it_is_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert entry.device("evaluate", EvaluateResources(gpus=1)) == torch.device("cuda")
    assert entry.device("evaluate", EvaluateResources()) == torch.device("cpu")


@pytest.mark.parametrize("variable", ["RAY_TMPDIR", "TMPDIR"])
def test_the_directory_of_ray_is_ones_own_if_another_user_owns_the_default(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory() as name:  # not tmp_path, into which another user does not see
        monkeypatch.setenv(variable, name)
        Path(name).chmod(0o755)
        directory = Path(name) / "ray"
        assert entry.ray_directory() is None
        directory.mkdir()
        assert entry.ray_directory() is None
        directory.chmod(0o500)
        user = os.geteuid()
        if user == 0:  # whom no mode stops
            os.seteuid(65534)
        try:
            assert entry.ray_directory() == f"{directory}-{os.geteuid()}"
        finally:
            os.seteuid(user)
            directory.chmod(0o700)


def test_a_path_with_spaces_is_refused_before_ray_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/home/me/my project/.venv/bin/python")
    with pytest.raises(UserError, match=r"my project.*does not start from a path with spaces"):
        entry.start_ray()


@pytest.mark.parametrize(
    ("corpus", "serve", "expected"),
    [
        ("", "", CHAT_TEMPLATE),
        ('chat_template = "a{content}"', "", "a{content}"),
        ('chat_template = "a{content}"', 'chat_template = "b{content}"', "b{content}"),
    ],
)
def test_the_endpoints_chats_have_the_form_of_the_corpus(
    tmp_path: Path, corpus: str, serve: str, expected: str
) -> None:
    path = tmp_path / "a.toml"
    path.write_text(f'name = "a"\n[corpus]\nsources = ["a.txt"]\n{corpus}\n[serve]\n{serve}\n')
    assert entry.load_config(str(path), []).serve.chat_template == expected


JOB = """
from jobs import entry
entry.main("test", "", lambda config, context: {"by_hand": entry.is_used_by_hand(config.storage)})
"""


@pytest.mark.parametrize(("arguments", "by_hand"), [([], True), (["--parent", "run"], False)])
def test_a_job_that_no_workflow_started_is_noted_while_it_runs(
    tmp_path: Path, arguments: list[str], by_hand: bool
) -> None:
    config = json.dumps({"storage": str(tmp_path), "corpus": {"sources": ["a.txt"]}})
    command = [sys.executable, "-c", JOB, config, *arguments]
    job = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert json.loads(job.stdout) == {"by_hand": by_hand}, job.stderr
    assert not entry.is_used_by_hand(str(tmp_path))
