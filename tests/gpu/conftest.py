"""All tests here want a CUDA device, and only torch, numpy, pydantic, safetensors and pytest (make test-gpu)."""

from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", 0)
