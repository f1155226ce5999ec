"""Links of a lineage that do not need a whole pipeline: checkpoint and tokenizer, and those that cannot be reached."""

from pathlib import Path

import pytest
from torch import Tensor

from gru import storage
from gru.corpus.tokenizer import Tokenizer
from gru.digests import DamagedFiles
from gru.registry import lineage_trace, tracking, versions
from gru.registry.bundle import load_bundle
from gru.registry.lineage_trace import Link
from gru.registry.versions import Version
from gru.training import checkpoint as checkpoints
from gru.training.checkpoint import Checkpoint
from gru.training.initial_model import digest_at
from tests.gru.registry.bundles import LINEAGE, write


@pytest.fixture
def run(mlflow_store: str) -> tracking.Run:
    return tracking.open_run("test", "key", "promote")


def load_average(path: str) -> dict[str, Tensor]:
    return checkpoints.load(path).average


def trace(version: Version, verify: bool = True) -> dict[str, Link]:
    names: list[str] = []
    links = lineage_trace.trace(version, verify, names.append, load_average, digest_at)
    assert [link.name for link in links[1:]] == names
    return {link.name: link for link in links}


def test_an_older_bundle_records_no_checkpoint(tmp_path: Path, tokenizer: Tokenizer, run: tracking.Run) -> None:
    lineage = LINEAGE.model_copy(update={"run": run.id, "tokenizer_digest": tokenizer.digest})
    version = versions.register(run, "m", write(tmp_path / "bundle", tokenizer, 1, lineage), 2.0, "text")
    links = trace(version)
    assert {name: link.state for name, link in links.items()} == {
        "version": "found",
        "bundle": "verified",
        "run": "found",
        "checkpoint": "absent",
        "dataset": "absent",
        "tokenizer": "verified",
        "sources": "absent",
    }
    assert links["checkpoint"].problem == "its bundle does not record the checkpoint's path"
    text = lineage_trace.report("m:1", list(links.values()))
    assert "  checkpoint  absent     its bundle does not record the checkpoint's path" in text.splitlines()


def test_a_checkpoint_is_compared_with_the_bundle(tmp_path: Path, tokenizer: Tokenizer, run: tracking.Run) -> None:
    path = str(tmp_path / "run" / checkpoints.new_name(1))
    lineage = LINEAGE.model_copy(update={"run": run.id, "checkpoint": path})
    bundle_path = write(tmp_path / "bundle", tokenizer, 1, lineage)
    version = versions.register(run, "m", bundle_path, 2.0, "text")
    assert trace(version)["checkpoint"].problem == f"{path} does not exist"

    weights = load_bundle(bundle_path).model.state_dict()
    older = {name.replace(".cell.", ".gru.", 1): tensor for name, tensor in weights.items()}
    for names in (weights, older):
        checkpoints.save(Checkpoint({"ema": names}, {"step": 1}), path)
        assert trace(version, verify=False)["checkpoint"].state == "found"
        link = trace(version)["checkpoint"]
        assert (link.state, link.facts) == ("verified", {"step": 1, "path": path})

    file = Path(path) / "ema.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    with pytest.raises(DamagedFiles):
        load_average(path)
    assert trace(version)["checkpoint"].state == "different"

    storage.remove(path)
    others = {name: tensor + 1 for name, tensor in weights.items()}
    checkpoints.save(Checkpoint({"ema": others}, {"step": 1}), path)
    link = trace(version)["checkpoint"]
    assert (link.state, link.problem) == ("different", f"{path}: its averaged weights differ from the bundle's weights")


def test_a_tokenizer_that_differs_is_named(tmp_path: Path, tokenizer: Tokenizer, run: tracking.Run) -> None:
    version = versions.register(run, "m", write(tmp_path / "bundle", tokenizer, 1), 2.0, "text")
    link = trace(version)["tokenizer"]
    assert link.state == "different"
    assert link.problem == f"its digest in the bundle is {tokenizer.digest}, expected t"
