"""Sources and storage in a bucket, of a server on this machine that speaks S3."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest

from gru import storage
from gru.config import CorpusConfig, TokenizerConfig
from gru.corpus.dataset import open_dataset
from gru.corpus.prepare import prepare
from tests.gru.corpus.reading import read, spans, texts, write

ROOT = Path(__file__).parents[3]


def fill(directory: Path, bucket: str) -> None:
    lines = "".join(json.dumps({"text": f"{i} 黃河 😀"}, ensure_ascii=False) + "\n" for i in range(2000))
    write(directory / "a.jsonl", lines.encode())
    write(directory / "b c/é.txt", b"one\r\ntwo\n" * 500)
    write(directory / "d.txt.gz", gzip.compress(b"packed"))
    write(directory / "e.csv", b"text\n" + b'"two\nlines"\n' * 1000)
    filesystem = fsspec.filesystem("s3")
    for path in directory.rglob("*.*"):
        filesystem.pipe(f"{bucket}/in/{path.relative_to(directory)}", path.read_bytes())


def test_objects_read_as_files(bucket: str, tmp_path: Path) -> None:
    fill(tmp_path, bucket)
    for settings in ({"partition_bytes": 5000}, {"exclude": ["*.csv"]}, {"include": ["*.txt"]}):
        here, there = ({"sources": [source], **settings} for source in (str(tmp_path), f"{bucket}/in"))
        assert [s.file.name for s in spans(CorpusConfig(**here))] == [s.file.name for s in spans(CorpusConfig(**there))]
        assert read(str(tmp_path), **settings) == read(f"{bucket}/in", **settings)
    assert texts(f"{bucket}/in/*.jsonl") == texts(f"{tmp_path}/a.jsonl")
    assert texts(f"{bucket}/in/b c/é.txt") == texts(f"{tmp_path}/b c/é.txt")
    [span] = spans(CorpusConfig(sources=[f"{bucket}/in/d.txt.gz"]))
    with span.file.open() as file:
        assert not span.file.changed(file)
        fsspec.filesystem("s3").pipe(f"{bucket}/in/d.txt.gz", gzip.compress(b"PACKED"))
        assert span.file.changed(file)


@pytest.mark.usefixtures("ray_local")
def test_a_dataset_is_the_same_in_a_bucket(bucket: str, tmp_path: Path) -> None:
    fill(tmp_path / "in", bucket)
    settings = {"partition_bytes": 60_000, "heldout_share": 0.1}
    local = prepare(
        CorpusConfig(sources=[str(tmp_path / "in")], **settings),
        TokenizerConfig(kind="char"),
        str(tmp_path / "d"),
        print,
    )
    config = {
        "storage": f"{bucket}/store",
        "corpus": {"sources": [f"{bucket}/in"], **settings},
        "tokenizer": {"kind": "char"},
    }
    command = [sys.executable, "-m", "jobs.prepare", json.dumps(config)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    remote = open_dataset(result["dataset"])
    assert result["digest"] == remote.manifest.digest == local.manifest.digest
    remote.verify()
    assert list(remote.texts("heldout")) == list(local.texts("heldout"))
    beside = set(storage.names(result["dataset"])) - {shard.name for shard in remote.manifest.shards}
    assert beside == {"manifest.json", "tokenizer.json", "result.json"}
