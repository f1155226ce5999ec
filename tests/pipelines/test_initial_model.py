"""The model from which a workflow starts is looked up once, whatever its alias names when the workflow is recovered."""

import json
import threading
from pathlib import Path

from dbos import DBOS
from mlflow import MlflowClient

from gru import config as configuration
from gru.config import TokenizerConfig
from gru.corpus.tokenizer import train_tokenizer
from gru.registry import tracking, versions
from pipelines import workflow
from tests.gru.registry import bundles
from tests.waiting import wait_until

interrupted = threading.Event()


@DBOS.workflow(name="look_up")
def look_up(config_json: str) -> str:
    [pinned] = workflow.pin_initial([config_json])
    while not interrupted.is_set():
        DBOS.sleep(0.05)
    return pinned


def test_a_recovered_workflow_keeps_the_model_that_its_alias_named(tmp_path: Path, mlflow_store: str) -> None:
    tokenizer = train_tokenizer(TokenizerConfig(kind="byte"), [])
    run = tracking.open_run("test", "key", "promote")
    one, two = (
        versions.register(run, "crows", bundles.write(tmp_path / str(seed), tokenizer, seed), 2.0, "text")
        for seed in (1, 2)
    )
    client = MlflowClient()
    client.set_registered_model_alias("crows", versions.CHAMPION, one.version)
    table = {
        "name": "crows",
        "storage": str(tmp_path / "store"),
        "corpus": {"sources": [str(tmp_path / "corpus.txt")]},
        "model": bundles.CONFIG.model_dump(),
        "train": {"init_from": "@champion"},
    }
    (tmp_path / "corpus.txt").write_text("A crow met a fox.\n" * 100)
    config_json = configuration.load(json.dumps(table)).model_dump_json()
    database = f"sqlite:///{tmp_path / 'workflows.sqlite'}"
    DBOS(config={"name": "gru", "system_database_url": database, "console_log_level": "CRITICAL"})
    DBOS.launch()
    try:
        handle = DBOS.start_workflow(look_up, config_json)
        wait_until("the look-up", lambda: len(DBOS.list_workflow_steps(handle.workflow_id)) > 1)
        DBOS.cancel_workflow(handle.workflow_id)
        client.set_registered_model_alias("crows", versions.CHAMPION, two.version)
        interrupted.set()
        recovered = configuration.load(DBOS.resume_workflow(handle.workflow_id).get_result())
        fresh = configuration.load(DBOS.start_workflow(look_up, config_json).get_result())
    finally:
        DBOS.destroy()
    assert (recovered.train.init_from, recovered.train.init_digest) == ("crows:1", one.bundle)
    assert (fresh.train.init_from, fresh.train.init_digest) == ("crows:2", two.bundle)
