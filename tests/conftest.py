"""Fixtures of several test modules: a corpus, one Ray for the session, an MLflow store for each test, a bucket."""

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

from jobs import entry

os.environ.setdefault("RAY_worker_niceness", "0")  # 15 by default: other tests would starve Ray's workers
os.environ.pop("RAY_ADDRESS", None)
os.environ.pop("MLFLOW_TRACKING_URI", None)
entry.prepare_libraries()

SERVICES = {
    "ray_local",
    "cluster",
    "mlflow_store",
    "empty_database",
    "bucket",
    "postgres",
    "pipeline",
    "killed_pipeline",
}
"""Fixtures that start a service; importing Ray or MLflow alone takes seconds."""


PIPELINE_FILES = "tests/pipelines/test_pipeline"
"""How the paths of the files begin whose tests share one pipeline, in the order of these files."""

LONGEST = [PIPELINE_FILES, "tests/gru/training/test_faults", "tests/pipelines/test_faults"]
"""How the paths of the files begin that take most time, the longest of each command first."""


def pytest_itemcollected(item: pytest.Item) -> None:
    if SERVICES.intersection(getattr(item, "fixturenames", ())):
        item.add_marker(pytest.mark.services)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the longest files begin first, so that no process has one left while the others have nothing to do."""
    heavy = {item.path for item in items if item.get_closest_marker("services")}

    def place(item: pytest.Item) -> tuple[int, bool]:
        rank = next((rank for rank, start in enumerate(LONGEST) if item.nodeid.startswith(start)), len(LONGEST))
        return rank, item.path not in heavy

    items.sort(key=place)


class FileScheduling(LoadFileScheduling):
    """Give each process of pytest-xdist whole files, and those that share a pipeline to one process."""

    def _split_scope(self, nodeid: str) -> str:
        return PIPELINE_FILES if nodeid.startswith(PIPELINE_FILES) else super()._split_scope(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> FileScheduling:
    return FileScheduling(config, log)


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """A local Ray for the session, with four logical CPUs."""
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with empty tables, which take seconds to create."""
    import mlflow

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def mlflow_store(empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URI of an empty MLflow store, which MLflow uses by default during the test."""
    import mlflow

    before = mlflow.get_tracking_uri()
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    mlflow.set_tracking_uri(uri)
    client = mlflow.MlflowClient()
    client.create_experiment("test", artifact_location=str(tmp_path / "artifacts"))
    yield uri
    mlflow.set_tracking_uri(before)


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The URL of an S3 bucket; its server and credentials are in environment variables, as for a user."""
    import fsspec
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()
        fsspec.filesystem("s3").makedirs("corpora", exist_ok=True)  # moto keeps its buckets for the process
        yield "s3://corpora"
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture(scope="session")
def fables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSON Lines corpus of 3,000 short documents with title and text, whose language is learned quickly."""
    path = tmp_path_factory.mktemp("corpus") / "fables.jsonl"
    path.write_text("".join(f'{{"title": "{t}", "text": "{b}"}}\n' for t, b in fable_texts(random.Random(0), 3000)))
    return path


def fable_texts(chance: random.Random, count: int) -> Iterator[tuple[str, str]]:
    animals, places = ["fox", "crow", "lion", "mouse", "tortoise", "hare"], ["river", "wood", "field", "road"]
    for _ in range(count):
        one, other = chance.sample(animals, 2)
        sentences = [
            f"A {one} met a {other} by the {chance.choice(places)}.",
            f"The {one} said to the {other}: come with me to the {chance.choice(places)}.",
            f"The {other} did not want to go, and the {one} went alone.",
        ]
        yield f"The {one} and the {other}", " ".join(sentences[: chance.randint(1, 3)])
