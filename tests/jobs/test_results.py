"""Results of stages on storage: written, read back, and not taken from another version."""

from pathlib import Path

import pytest

from gru import config as configuration
from gru import storage
from gru.errors import UserError
from jobs import results, stages
from jobs.results import PrepareResult

RESULT: PrepareResult = {
    **{"stage": "prepare", "key": "k", "dataset": "/d", "digest": "d", "heldout_digest": "h"},
    **{"heldout_by": "hash", "reasons": {}, "dropped_bytes": {}, "passed_over": {}},
    **{"documents": 1, "bytes": 2, "tokens": 3, "dropped": 0, "vocabulary": 257, "shards": 1, "seconds": 0.5},
    **{"heldout_by": "hash", "reasons": {}, "dropped_bytes": {}, "passed_over": {}},
}  # type: ignore[typeddict-item]


@pytest.fixture
def stage(tmp_path: Path) -> stages.Stage[PrepareResult]:
    return stages.prepare_stage(configuration.load('{"corpus": {"sources": ["a.txt"]}}'), str(tmp_path / "key"))


def test_a_stage_is_done_when_its_result_is_committed(stage: stages.Stage[PrepareResult]) -> None:
    assert stage.result() is None
    with pytest.raises(UserError, match=r"stage prepare is not done for this config: run python -m jobs\.prepare"):
        stage.require()
    assert stage.commit(RESULT) == RESULT
    assert stage.result() == stage.require() == RESULT


def test_a_result_of_an_older_version_that_lacks_a_key_counts_as_not_done(stage: stages.Stage[PrepareResult]) -> None:
    storage.write_json(stage.path, {key: value for key, value in RESULT.items() if key != "heldout_digest"})
    assert stage.result() is None


def test_a_result_of_a_newer_version_that_has_more_keys_is_kept_whole() -> None:
    newer = {**RESULT, "more": 1}
    assert results.parse(PrepareResult, newer) == newer
    assert results.parse(PrepareResult, ["not", "a", "result"]) is None


@pytest.mark.parametrize("stage", stages.STAGES)
def test_each_result_is_described_by_its_own_keys(stage: str) -> None:
    samples = {
        "prepare": (RESULT, "1 document, 0.0 MB, 3 tokens"),
        "train": ({"steps": 1200, "heldout_loss": 1.5}, "1,200 steps, held-out 1.500 nats per token"),
        "evaluate": ({"bits_per_byte": 1.25}, "1.250 bits per byte"),
        "promote": (
            {"model": "m", "version": "2", "promoted": False, "reason": "worse"},
            "m version 2 is not @champion: worse",
        ),
        "serve": ({"version": "2", "endpoint": "http://h:1"}, "version 2 at http://h:1"),
    }
    result, description = samples[stage]
    assert results.describe(stage, result) == description
