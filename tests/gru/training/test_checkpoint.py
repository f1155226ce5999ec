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


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    loaded = checkpoints.load(str(write(tmp_path, 5)))
    assert loaded.step == 5
    assert torch.equal(loaded.tensors["model"]["w"], torch.full((2, 3), 5.0))
    assert set(loaded.tensors) == {"model", "lanes"}


def test_the_newest_is_used_whatever_its_name_ends_with(tmp_path: Path) -> None:
    for step in (10, 2, 9):
        write(tmp_path, step)
    assert step_of(checkpoints.newest(str(tmp_path), IDENTITY)) == 10
    assert checkpoints.newest(str(tmp_path / "nothing"), IDENTITY) is None


@pytest.mark.parametrize("damage", ["flipped byte", "missing file", "no digests", "truncated digests"])
def test_a_damaged_one_is_named_and_the_one_before_is_used(
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
        used = checkpoints.newest(str(tmp_path), IDENTITY)
    assert step_of(used) == 1
    assert newest.name in caplog.text
    checkpoints.discard_others(str(tmp_path), used)
    assert checkpoints.paths(str(tmp_path)) == [used]


def test_another_dataset_or_model_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path, 1)
    with pytest.raises(UserError, match="its dataset is d1, but this run's is d2"):
        checkpoints.newest(str(tmp_path), {**IDENTITY, "dataset": "d2"})
    with pytest.raises(UserError, match=r"its model\.hidden is 8, but this run's is 9"):
        checkpoints.newest(str(tmp_path), {**IDENTITY, "model": {"hidden": 9}})


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    checkpoints.prune(str(tmp_path), keep=2)
    assert [checkpoints.load(path).step for path in checkpoints.paths(str(tmp_path))] == [4, 3]


def test_the_one_with_the_lowest_heldout_loss_is_kept_as_well(tmp_path: Path) -> None:
    for step, loss in ((1, 2.0), (2, 1.5), (3, 1.7), (4, None), (5, None)):
        write(tmp_path, step, loss)
    assert checkpoints.best_heldout_loss(str(tmp_path)) == 1.5
    checkpoints.prune(str(tmp_path), keep=2)
    assert [step_of(path) for path in checkpoints.paths(str(tmp_path))] == [5, 4, 2]
    assert step_of(checkpoints.newest(str(tmp_path), IDENTITY)) == 5
    assert checkpoints.best_heldout_loss(str(tmp_path / "nothing")) == float("inf")


def test_an_incomplete_one_is_not_counted_among_those_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        directory = write(tmp_path, step)
        if step > 2:
            (directory / DIGESTS).unlink()
    checkpoints.prune(str(tmp_path), keep=1)
    assert [step_of(path) for path in checkpoints.paths(str(tmp_path))] == [2]


def test_a_full_disk_leaves_nothing_that_could_be_taken_for_a_checkpoint(tmp_path: Path) -> None:
    """The weights fit, the state of the lanes does not: what fitted is removed, and what was there before stays."""
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


def test_the_digests_come_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that comes in between finds an incomplete checkpoint, never a wrong one."""
    found: list[str | None] = []
    write_bytes = storage.write_bytes

    def write_and_look(path: str, data: bytes) -> None:
        found.append(checkpoints.newest(str(tmp_path), IDENTITY))
        write_bytes(path, data)

    monkeypatch.setattr(storage, "write_bytes", write_and_look)
    path = write(tmp_path, 1)
    assert found == [None] * len(list(path.iterdir()))
    assert step_of(checkpoints.newest(str(tmp_path), IDENTITY)) == 1
