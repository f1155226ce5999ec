"""The device of a job."""

import pytest
import torch

from gru.config import EvaluateResources, TrainResources
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
