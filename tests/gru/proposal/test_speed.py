import pytest

from gru.config import ModelConfig, TrainConfig
from gru.proposal import speed


def test_the_speed_of_training_is_measured_with_real_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_SECONDS", 0.02)
    train = TrainConfig(batch_size=4, sequence_length=8)
    rates = [
        speed.measure_speed(ModelConfig(embedding=width, hidden=width), train, 300, cores=1, gpu=False)
        for width in (32, 1024)
    ]
    assert rates[0] > 2 * rates[1] > 0
