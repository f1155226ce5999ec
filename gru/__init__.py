"""From text to a small, fast text generator. The names here are the library's front; all others are in its modules.

They are imported when they are first used, so that `import gru` takes no time.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gru.corpus.dataset import open_dataset
    from gru.generation.generate import generate
    from gru.registry.bundle import load_bundle
    from gru.training.single_process import train

__all__ = ["generate", "load_bundle", "open_dataset", "train"]

# PyTorch's threads spin while they wait for each other, by default for milliseconds. On a machine that has other work,
# that keeps a core from the very thread that is waited for: training steps took three times as long. So few turns cost
# nothing on a quiet machine. Read when PyTorch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

_MODULES = {
    "generate": "gru.generation.generate",
    "load_bundle": "gru.registry.bundle",
    "open_dataset": "gru.corpus.dataset",
    "train": "gru.training.single_process",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
