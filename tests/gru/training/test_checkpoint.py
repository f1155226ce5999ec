import json
import logging
from pathlib import Path

import pytest
import torch

from gru import storage
from gru.errors import UserError
from gru.training import checkpoint as checkpoints
from gru.training.checkpoint import Checkpoint, DamagedFiles

IDENTITY = {"dataset": "d1", "model": {"hidden": 8}}


def write(run: Path, step: int) -> Path:
    directory = run / checkpoints.new_name(step)
    directory.mkdir(parents=True)
    tensors = {"model": {"w": torch.full((2, 3), float(step))}, "lanes": {"state": torch.zeros(1)}}
    checkpoints.save(Checkpoint(tensors, {"step": step, "identity": IDENTITY}), directory)
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
    weights, digests = newest / "model.safetensors", newest / checkpoints.DIGESTS
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
    with pytest.raises(UserError, match="its model is"):
        checkpoints.newest(str(tmp_path), {**IDENTITY, "model": {"hidden": 9}})


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    checkpoints.prune(str(tmp_path), keep=2)
    assert [checkpoints.load(path).step for path in checkpoints.paths(str(tmp_path))] == [4, 3]


def test_an_incomplete_one_is_not_counted_among_those_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        directory = write(tmp_path, step)
        if step > 2:
            (directory / checkpoints.DIGESTS).unlink()
    checkpoints.prune(str(tmp_path), keep=1)
    assert [step_of(path) for path in checkpoints.paths(str(tmp_path))] == [2]


def test_an_upload_ends_with_the_digests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that comes in between finds an incomplete checkpoint, never a wrong one."""
    local, remote = write(tmp_path / "local", 1), tmp_path / "remote" / checkpoints.new_name(1)
    write_bytes = storage.write_bytes
    for file in sorted(local.iterdir()):
        if file.name != checkpoints.DIGESTS:
            write_bytes(str(remote / file.name), file.read_bytes())
    assert checkpoints.newest(str(remote.parent), IDENTITY) is None
    order: list[str] = []
    monkeypatch.setattr(storage, "write_bytes", lambda path, data: (order.append(path), write_bytes(path, data)))
    storage.upload(local, str(remote), last=checkpoints.DIGESTS)
    assert order[-1].endswith(checkpoints.DIGESTS)
    assert len(order) == len(json.loads((remote / checkpoints.DIGESTS).read_text())) + 1
    assert step_of(checkpoints.newest(str(remote.parent), IDENTITY)) == 1
