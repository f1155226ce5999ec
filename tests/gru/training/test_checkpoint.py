"""Tests of writing, finding and pruning checkpoints."""

import logging
import resource
from pathlib import Path

import pytest
import torch

from gru import storage
from gru.digests import DIGESTS, DamagedFiles
from gru.errors import UserError
from gru.training import checkpoint as checkpoints
from gru.training.checkpoint import Checkpoint

IDENTITY = {"dataset": "d1", "model": {"hidden": 8}}


def write(run: Path, step: int, heldout_loss: float | None = None) -> Path:
    directory = run / checkpoints.new_name(step)
    tensors = {"model": {"w": torch.full((2, 3), float(step))}, "lanes": {"state": torch.zeros(1)}}
    state = {"step": step, "identity": IDENTITY, "heldout_loss": heldout_loss}
    checkpoints.save(Checkpoint(tensors, state), str(directory))
    return directory


def step_of(path: str | None) -> int:
    assert path is not None
    return checkpoints.load(path).step


def test_a_saved_checkpoint_loads_with_the_same_content(tmp_path: Path) -> None:
    loaded = checkpoints.load(str(write(tmp_path, 5)))
    assert loaded.step == 5
    assert torch.equal(loaded.tensors["model"]["w"], torch.full((2, 3), 5.0))
    assert set(loaded.tensors) == {"model", "lanes"}


def test_the_newest_step_is_resumed_whatever_the_random_suffix(tmp_path: Path) -> None:
    for step in (10, 2, 9):
        write(tmp_path, step)
    assert step_of(checkpoints.newest(str(tmp_path), IDENTITY)) == 10
    assert checkpoints.newest(str(tmp_path / "nothing"), IDENTITY) is None


@pytest.mark.parametrize("damage", ["flipped byte", "missing file", "no digests", "truncated digests"])
def test_a_damaged_checkpoint_is_logged_and_the_one_before_is_resumed(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 1)
    newest = write(tmp_path, 2)
    weights, digests = newest / "model.safetensors", newest / DIGESTS
    if damage == "flipped byte":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    elif damage == "missing file":
        weights.unlink()
    elif damage == "no digests":
        digests.unlink()
    else:
        digests.write_text(digests.read_text()[:20])
    with pytest.raises(DamagedFiles):
        checkpoints.load(str(newest))
    with caplog.at_level(logging.WARNING):
        resumed = checkpoints.newest(str(tmp_path), IDENTITY)
    assert step_of(resumed) == 1
    assert newest.name in caplog.text
    checkpoints.discard_newer(str(tmp_path), resumed)
    assert checkpoints.paths(str(tmp_path)) == [resumed]


def test_a_checkpoint_of_another_dataset_or_model_is_refused_with_the_difference(tmp_path: Path) -> None:
    write(tmp_path, 1)
    with pytest.raises(UserError, match="its dataset is d1, but this run's is d2"):
        checkpoints.newest(str(tmp_path), {**IDENTITY, "dataset": "d2"})
    with pytest.raises(UserError, match=r"its model\.hidden is 8, but this run's is 9"):
        checkpoints.newest(str(tmp_path), {**IDENTITY, "model": {"hidden": 9}})


def test_prune_keeps_only_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    checkpoints.prune(str(tmp_path), keep=2)
    assert [checkpoints.load(path).step for path in checkpoints.paths(str(tmp_path))] == [4, 3]


def test_prune_also_keeps_the_one_with_the_lowest_heldout_loss(tmp_path: Path) -> None:
    for step, loss in ((1, 2.0), (2, 1.5), (3, 1.7), (4, None), (5, None)):
        write(tmp_path, step, loss)
    assert checkpoints.best_heldout_loss(str(tmp_path)) == 1.5
    checkpoints.prune(str(tmp_path), keep=2)
    assert [step_of(path) for path in checkpoints.paths(str(tmp_path))] == [5, 4, 2]
    assert step_of(checkpoints.newest(str(tmp_path), IDENTITY)) == 5
    assert checkpoints.best_heldout_loss(str(tmp_path / "nothing")) == float("inf")


def test_prune_does_not_count_incomplete_checkpoints(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        directory = write(tmp_path, step)
        if step > 2:
            (directory / DIGESTS).unlink()
    checkpoints.prune(str(tmp_path), keep=1)
    assert [step_of(path) for path in checkpoints.paths(str(tmp_path))] == [2]


def test_a_full_disk_leaves_no_partial_checkpoint(tmp_path: Path) -> None:
    """The weights fit on the disk, the states do not: the partial checkpoint is removed, the earlier one stays."""
    before = write(tmp_path, 1)
    tensors = {"model": {"w": torch.zeros(10)}, "lanes": {"state": torch.zeros(100_000)}}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            state = {"step": 2, "identity": IDENTITY}
            checkpoints.save(Checkpoint(tensors, state), str(tmp_path / checkpoints.new_name(2)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoints.paths(str(tmp_path)) == [str(before)]


def test_the_digests_are_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader during the writing finds an incomplete checkpoint, never a wrong one."""
    newest: list[str | None] = []
    write_bytes = storage.write_bytes

    def write_and_look(path: str, data: bytes) -> None:
        newest.append(checkpoints.newest(str(tmp_path), IDENTITY))
        write_bytes(path, data)

    monkeypatch.setattr(storage, "write_bytes", write_and_look)
    path = write(tmp_path, 1)
    assert newest == [None] * len(list(path.iterdir()))
    assert step_of(checkpoints.newest(str(tmp_path), IDENTITY)) == 1
