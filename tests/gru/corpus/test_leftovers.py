import os
import time
from pathlib import Path

import pytest

from gru.config import CorpusConfig, TokenizerConfig
from gru.corpus.prepare import dataset_key, prepare
from tests.gru.corpus.reading import write

BYTES = TokenizerConfig(kind="byte")
DAY = 24 * 3600


def unfinished(corpus: CorpusConfig, store: Path) -> Path:
    """Prepare a dataset up to its drafts."""

    def stop(line: str) -> None:
        if line.startswith("1/1 "):
            raise KeyboardInterrupt

    directory = store / dataset_key(corpus, BYTES)
    with pytest.raises(KeyboardInterrupt):
        prepare(corpus, BYTES, str(directory), stop)
    assert list(directory.glob("parts/draft-*.json"))
    return directory


def age(directory: Path, seconds: float) -> None:
    for path in directory.rglob("*"):
        os.utime(path, (time.time() - seconds,) * 2)


def test_unfinished_datasets_of_sources_that_changed_are_removed_after_a_day(tmp_path: Path) -> None:
    store = tmp_path / "datasets"
    corpora = {
        name: CorpusConfig(sources=[write(tmp_path / f"{name}.txt", f"{name}\n".encode() * 99)])
        for name in ("changed", "recent", "pending", "absent", "finished", "own")
    }
    paths = {name: unfinished(corpus, store) for name, corpus in corpora.items() if name not in ("finished", "own")}
    paths["finished"] = Path(prepare(corpora["finished"], BYTES, str(store / "finished"), print).directory)
    other = store / "of somebody else"
    write(other / "parts" / "draft-00000.json", b"{}")
    for name in ("changed", "recent", "finished"):
        write(tmp_path / f"{name}.txt", b"other text\n" * 99)
    (tmp_path / "absent.txt").unlink()
    for path in (*paths.values(), other):
        age(path, 2 * DAY)
    newest = next(paths["recent"].glob("parts/*"))
    os.utime(newest, (time.time() - DAY / 2,) * 2)

    seen: list[str] = []
    prepare(corpora["own"], BYTES, str(store / "own"), seen.append)
    changed = paths.pop("changed")
    assert not changed.exists()
    assert all(path.exists() for path in (*paths.values(), other))
    assert [line for line in seen if "removed" in line] == [
        f"removed {changed}: an unfinished dataset of sources that have changed since"
    ]
