"""A pipeline that the tests of this package share, in the order of their files."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pipelines.pipeline import GRU, STEPS, Pipeline, free_ports


@pytest.fixture(scope="package")
def pipeline(tmp_path_factory: pytest.TempPathFactory, fables: Path) -> Iterator[Pipeline]:
    pipeline = Pipeline(tmp_path_factory.mktemp("pipeline"), fables, *free_ports(3))
    try:
        pipeline.start()
        pipeline.wait_for_stage("prepare")
        pipeline.kill()  # the workflow alone: Ray continues its job
        pipeline.start()
        pipeline.wait_for_step(1)
        pipeline.kill_everything()
        assert pipeline.newest_step() < STEPS, "training ended before it was killed"
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
    finally:
        subprocess.run([*GRU, "down", str(pipeline.storage)], capture_output=True)
        if pipeline.process and pipeline.process.poll() is None:
            pipeline.kill()
