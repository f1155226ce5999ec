"""The browser of the playground's tests."""

from tests.gru.serving.playground.conftest import driver

__all__ = ["driver"]
