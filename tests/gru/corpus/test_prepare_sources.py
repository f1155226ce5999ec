"""Several sources with their own settings, limits, and files with what was left out."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq
import pytest

from gru.config import CorpusConfig, TokenizerConfig
from gru.config_corpus import SourceConfig
from gru.corpus.dataset import Dataset
from gru.corpus.prepare import prepare
from gru.errors import UserError
from tests.gru.corpus.reading import write

pytestmark = pytest.mark.usefixtures("ray_local")

BYTES = TokenizerConfig(kind="byte")


def silent(_: str) -> None: ...


def json_lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def by_source(dataset: Dataset) -> list[list[str]]:
    """Return the documents of each source in order, and assert that the shards are as the manifest says."""
    dataset.verify()
    tokenizer = dataset.tokenizer()
    found: list[list[str]] = [[] for _ in dataset.manifest.corpus.source_options()]
    for shard in dataset.manifest.shards:
        table = pq.read_table(f"{dataset.directory}/{shard.name}")
        texts = [tokenizer.decode(tokens[:-1]) for tokens in table["tokens"].to_pylist()]
        assert len(texts) == shard.counts.documents and len("".join(texts)) == shard.counts.characters
        found[shard.source] += texts
    return found


def test_each_shard_belongs_to_one_source(tmp_path: Path) -> None:
    write(tmp_path / "verse" / "a.jsonl", json_lines([f"verse {i}" for i in range(50)]))
    write(tmp_path / "prose" / "b.jsonl", b'{"title": "One", "body": "of prose"}\n{"title": "Two", "body": "more"}\n')
    path = write(tmp_path / "c.jsonl", json_lines([f"listed {i}" for i in range(50)]))
    corpus = CorpusConfig(
        sources=[path],
        source=[
            SourceConfig(path=str(tmp_path / "verse")),
            SourceConfig(path=[str(tmp_path / "prose")], template="{title}: {body}", weight=2.0),
        ],
        heldout_share=0.2,
    )
    dataset = prepare(corpus, BYTES, str(tmp_path / "d"), silent)
    assert [sorted(texts) for texts in by_source(dataset)] == [
        sorted(f"listed {i}" for i in range(50)),
        sorted(f"verse {i}" for i in range(50)),
        ["One: of prose", "Two: more"],
    ]
    with pytest.raises(UserError, match=r"^corpus.source.0, corpus.source.1: no document to train on in "):
        prepare(corpus.model_copy(update={"sources": [], "min_characters": 99}), BYTES, str(tmp_path / "none"), silent)


def test_the_first_documents_of_a_source_stay_whatever_the_partitions(tmp_path: Path) -> None:
    texts = [f"{'verse' if i % 7 else 'again'} {i % 40}" for i in range(200)]
    paths = [
        write(tmp_path / "c" / f"{i}.jsonl", json_lines(texts[start : start + 50]))
        for i, start in enumerate(range(0, 200, 50))
    ]
    other = write(tmp_path / "other.jsonl", json_lines([*texts[150:], "only here"]))
    first = list(dict.fromkeys(texts[:90]))
    second = [text for text in dict.fromkeys(texts[150:]) if text not in first]
    assert second, "some are beyond the limit of the first source, and still are in the second"
    for size in (300, 2000, 10**6):
        corpus = CorpusConfig(
            source=[SourceConfig(path=paths, limit=90), SourceConfig(path=other)],
            heldout="tail",
            heldout_share=0.05,
            partition_bytes=size,
        )
        dataset = prepare(corpus, BYTES, str(tmp_path / f"{size}"), silent)
        assert by_source(dataset) == [first, [*second, "only here"]]
        repeated = 90 - len(first) + 50 - len(second)
        assert dataset.manifest.dropped == {"duplicate": repeated}
        assert sum(source.name != "other.jsonl" for source in dataset.manifest.sources) == 2, "others are not read"
    everything = corpus.model_copy(update={"deduplicate": "none"})
    dataset = prepare(everything, BYTES, str(tmp_path / "none"), silent)
    assert by_source(dataset) == [texts[:90], [*texts[150:], "only here"]]
    assert dataset.manifest.dropped == {}


def read_dropped(directory: str) -> list[dict[str, Any]]:
    filesystem, path = fsspec.core.url_to_fs(directory)
    names = sorted(filesystem.find(path))
    assert all(name.endswith(".jsonl") for name in names)
    return [json.loads(line) for name in names for line in filesystem.cat_file(name).splitlines()]


def test_what_is_left_out_is_written_with_its_reason(tmp_path: Path) -> None:
    good = [f"number {i}" for i in range(300)]
    lines = [json.dumps({"text": text}) for text in [*good[:100], "x", "y" * 9000, *good, good[5]]]
    lines.insert(150, "{ bad")
    path = write(tmp_path / "a.jsonl", "\n".join(lines).encode())
    for size in (1500, 10**6):
        target = tmp_path / f"dropped{size}"
        corpus = CorpusConfig(
            sources=[path],
            min_characters=2,
            max_characters=5000,
            partition_bytes=size,
            dropped=str(target),
            heldout_share=0.1,
        )
        dataset = prepare(corpus, BYTES, str(tmp_path / f"{size}"), silent)
        [key] = target.iterdir()
        found = read_dropped(str(key))
        assert Counter(line["reason"] for line in found) == dataset.manifest.dropped
        assert {line["source"] for line in found} == {"a.jsonl"}
        one_of = {line["reason"]: line for line in found}
        assert one_of["too_short"]["text"] == "x"
        assert (one_of["too_long"]["text"], one_of["too_long"]["characters"]) == ("y" * 4096, 9000)
        assert "the line at byte" in one_of["bad_record"]["message"]
        assert sorted(line["text"] for line in found if line["reason"] == "duplicate") == sorted([*good[:100], good[5]])
    with pytest.raises(UserError, match=r"^corpus.dropped = '/proc/no': cannot write there"):
        prepare(corpus.model_copy(update={"dropped": "/proc/no"}), BYTES, str(tmp_path / "no"), silent)


def test_what_is_left_out_may_be_written_to_a_bucket(tmp_path: Path, bucket: str) -> None:
    path = write(tmp_path / "a.jsonl", json_lines([f"{i % 90}" for i in range(100)]))
    corpus = CorpusConfig(sources=[path], dropped=f"{bucket}/dropped", heldout_share=0.1)
    dataset = prepare(corpus, BYTES, str(tmp_path / "d"), silent)
    found = read_dropped(f"{bucket}/dropped")
    assert [line["text"] for line in found] == [f"{i}" for i in range(10)]
    assert dataset.manifest.dropped == {"duplicate": 10}
