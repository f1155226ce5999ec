"""Tests of the choice of precision."""

import os
import subprocess
import sys

import pytest
import torch

from gru.config import ModelConfig
from gru.model import precision

CPU = torch.device("cpu")


def test_a_configured_precision_is_used_without_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(precision, "bf16_advantage")
    assert precision.resolve(ModelConfig(precision="bf16"), CPU) == "bf16"
    assert precision.resolve(ModelConfig(precision="fp32"), CPU) == "fp32"


@pytest.mark.parametrize(("advantage", "expected"), [(0.5, "fp32"), (1.0, "fp32"), (2.0, "bf16")])
def test_auto_chooses_bf16_where_it_is_faster(monkeypatch: pytest.MonkeyPatch, advantage: float, expected: str) -> None:
    monkeypatch.setattr(precision, "bf16_advantage", lambda: advantage)
    assert precision.resolve(ModelConfig(), CPU) == expected


def test_the_advantage_is_measured_once() -> None:
    assert precision.bf16_advantage() == precision.bf16_advantage() > 0


def test_other_work_on_the_machine_does_not_change_the_choice() -> None:
    alone = precision.bf16_advantage()
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        beside = [precision.bf16_advantage.__wrapped__() for _ in range(3)]
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert {advantage > precision.ADVANTAGE for advantage in beside} == {alone > precision.ADVANTAGE}


def test_tf32_is_off_within_the_context_only() -> None:
    cudnn = torch.backends.cudnn
    before = (cudnn.enabled, cudnn.allow_tf32)
    with precision.without_tf32():
        assert (cudnn.enabled, cudnn.allow_tf32) == (True, False)
    assert (cudnn.enabled, cudnn.allow_tf32) == before
