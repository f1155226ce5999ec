"""Pipelines that the tests of this package share, in the order of their files."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.pipelines.pipeline import GRU, Pipeline, free_ports


@contextmanager
def pipeline_in(directory: Path, corpus: Path, steps: int) -> Iterator[Pipeline]:
    """Yield a pipeline that is not started yet; stop what it has started at the end."""
    pipeline = Pipeline(directory, corpus, *free_ports(3), steps)
    try:
        yield pipeline
    finally:
        subprocess.run([*GRU, "down", str(pipeline.storage)], capture_output=True)
        if pipeline.process and pipeline.process.poll() is None:
            pipeline.kill()


@pytest.fixture(scope="package")
def pipeline(tmp_path_factory: pytest.TempPathFactory, fables: Path) -> Iterator[Pipeline]:
    """A pipeline that is up, with a result."""
    with pipeline_in(tmp_path_factory.mktemp("pipeline"), fables, steps=300) as pipeline:
        pipeline.start()
        pipeline.wait_for_result()
        yield pipeline


@pytest.fixture(scope="package")
def killed_pipeline(tmp_path_factory: pytest.TempPathFactory, fables: Path) -> Iterator[Pipeline]:
    """A pipeline that is up, with a result, and was killed with SIGKILL in every stage: in turn alone, which leaves Ray
    to continue its job, and with every process."""
    with pipeline_in(tmp_path_factory.mktemp("killed"), fables, steps=600) as pipeline:
        pipeline.start()
        pipeline.wait_for_stage("prepare")
        pipeline.kill()
        pipeline.start()
        pipeline.wait_for_step(1)
        pipeline.kill_everything()
        assert pipeline.newest_step() < pipeline.steps, "training ended before it was killed"
        pipeline.start()
        pipeline.wait_for_stage("evaluate")
        pipeline.kill_everything()
        pipeline.start()
        pipeline.wait_for_stage("promote")
        pipeline.kill()
        pipeline.start()
        pipeline.wait_for_stage("serve")
        pipeline.kill_everything()
        pipeline.start()
        pipeline.wait_for_result()
        yield pipeline
