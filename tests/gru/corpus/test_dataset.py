import json
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pandas
import pyarrow.parquet as pq
import pytest

from gru.config import CorpusConfig, TokenizerConfig
from gru.corpus.dataset import Dataset, open_dataset
from gru.corpus.documents import document_hash
from gru.corpus.prepare import prepare
from gru.errors import UserError

TEXTS = [f"poem {i} 黃河\n" + "入海流。😀 " * (i % 17) ** 2 for i in range(300)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> CorpusConfig:
    path = tmp_path_factory.mktemp("corpus") / "poems.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return CorpusConfig(sources=[str(path)], partition_bytes=40_000, segment_tokens=1000, heldout_share=0.1)


@pytest.fixture(scope="module")
def dataset(corpus: CorpusConfig, tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> Dataset:
    return prepare(corpus, TokenizerConfig(kind="byte"), str(tmp_path_factory.mktemp("store") / "d"), lambda _: None)


def test_segments_are_row_groups_of_about_segment_tokens(corpus: CorpusConfig, dataset: Dataset) -> None:
    segments = dataset.segments("train")
    assert sum(segment.tokens for segment in segments) == dataset.manifest.train.tokens
    last = {segment.shard: segment for segment in segments}
    for segment in segments:
        tokens = dataset.read_segment(segment)
        assert len(tokens) == segment.tokens < 2 * corpus.segment_tokens
        assert segment.tokens >= corpus.segment_tokens or segment is last[segment.shard]
    shard = dataset.manifest.shards[0]
    table = pq.read_table(Path(dataset.directory) / shard.name)
    assert [str(field.type) for field in table.schema] == ["uint64", "string", "list<element: uint16>"]
    rows = table.to_pylist()
    assert len(rows) > len({row["document"] for row in rows})  # long documents have several rows
    for row, after in zip(rows, [*rows[1:], None], strict=True):
        goes_on = after is not None and after["document"] == row["document"]
        assert (row["tokens"][-1] == dataset.manifest.end_of_text) != goes_on


def test_shards_open_in_pandas_as_they_are(dataset: Dataset) -> None:
    frame = pandas.concat([pandas.read_parquet(f"{dataset.directory}/{s.name}") for s in dataset.manifest.shards])
    assert list(frame.columns) == ["document", "source", "tokens"]
    assert frame["document"].dtype == np.uint64
    assert set(frame["source"]) == {"poems.jsonl"}
    tokens = frame.groupby("document")["tokens"].apply(lambda rows: np.concatenate(list(rows)))
    assert len(tokens) == len(TEXTS)
    tokenizer = dataset.tokenizer()
    for text in TEXTS:
        *ids, end = tokens[document_hash(text.encode())]
        assert end == dataset.manifest.end_of_text
        assert tokenizer.decode(ids) == text


def test_a_document_is_found_by_its_hash(dataset: Dataset) -> None:
    names = {document_hash(text.encode()): text for text in TEXTS}
    assert max(names) > 2**63 > min(names)
    for name in [min(names), max(names), document_hash(TEXTS[16].encode())]:
        assert dataset.document(name) == ("poems.jsonl", names[name])
    assert len(dataset.tokenizer().encode(TEXTS[16])) > 3000  # in several segments
    assert dataset.document(0) is None
    assert dataset.document(2**64 - 1) is None


def test_the_distribution_of_lengths_is_in_the_manifest(dataset: Dataset) -> None:
    lengths = [len(text.encode()) + 1 for text in TEXTS]
    found = np.zeros(20, dtype=int)
    for shard in dataset.manifest.shards:
        found[: len(shard.lengths)] += shard.lengths
    expected = [sum(2**i >= n > (2 ** (i - 1) if i else 0) for n in lengths) for i in range(20)]
    assert found.tolist() == expected


def test_damage_is_reported(dataset: Dataset, tmp_path: Path) -> None:
    def damaged(name: str, change: object) -> str:
        shutil.rmtree(tmp_path / "d", ignore_errors=True)
        shutil.copytree(dataset.directory, tmp_path / "d")
        path = tmp_path / "d" / name
        path.write_bytes(change(path.read_bytes()))  # type: ignore[operator]
        return str(tmp_path / "d")

    name = dataset.segments("train")[0].shard
    for change in (lambda data: data[:-1], lambda data: data[:99] + bytes([data[99] ^ 1]) + data[100:]):
        with pytest.raises(UserError, match=f"{name}: damaged"):
            open_dataset(damaged(name, change)).verify()
    with pytest.raises(UserError, match=f"{name}: damaged: its size differs"):
        copy = open_dataset(damaged(name, lambda data: data + b"x"))
        copy.read_segment(copy.segments("train")[0])
    with pytest.raises(UserError, match=r"manifest.json: damaged"):
        open_dataset(damaged("manifest.json", lambda data: data.replace(b'"documents": ', b'"documents": 1', 1)))
    with pytest.raises(UserError, match=r"tokenizer.json: damaged"):
        open_dataset(damaged("tokenizer.json", lambda data: data + b" "))
    copy = open_dataset(damaged(name, lambda data: data))
    (tmp_path / "d" / name).unlink()
    for read in (copy.verify, lambda: list(copy.texts("train")), lambda: copy.document(0)):
        with pytest.raises(UserError, match=f"{name}: cannot be read"):
            read()
    with pytest.raises(UserError, match=r"not a dataset: it has no manifest.json"):
        open_dataset(str(tmp_path / "elsewhere"))


def test_reading_needs_no_more_than_a_url(dataset: Dataset) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(dataset.directory, "/store/d", recursive=True)
    copy = open_dataset("memory://store/d")
    assert list(copy.texts("heldout")) == list(dataset.texts("heldout"))
    segment = dataset.segments("train")[3]
    assert np.array_equal(copy.read_segment(segment), dataset.read_segment(segment))
