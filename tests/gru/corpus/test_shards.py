import random
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from gru import storage
from gru.config import CorpusConfig, TokenizerConfig
from gru.corpus import shards, tokenizer
from gru.corpus.listing import list_files
from gru.corpus.partitions import plan
from gru.corpus.rewrite import rewrite
from gru.corpus.shards import PartitionResult, ShardContext
from gru.errors import UserError
from tests.gru.corpus.reading import write


def context(corpus: CorpusConfig, directory: Path, parallel: bool = False) -> ShardContext:
    char = tokenizer.train_tokenizer(TokenizerConfig(kind="char"), ["abcxy \n"])
    storage.write_bytes(str(directory / "tokenizer.json"), char.json)
    return ShardContext(str(directory), corpus, char.digest, parallel)


def make(texts: list[str], directory: Path, **settings: object) -> tuple[ShardContext, PartitionResult]:
    path = write(directory.parent / "a.txt", "|".join(texts).encode())
    corpus = CorpusConfig(sources=[path], separator="|", **{"segment_tokens": 100, "heldout_share": 0.3, **settings})
    [partition] = plan(list_files(corpus).files, corpus)
    shared = context(corpus, directory)
    return shared, shards.draft(shared, 7, partition)


def texts(context: ShardContext, path: Path) -> list[str]:
    """Return the documents of a shard, and assert that its row groups have the configured length."""
    reader, coder = pq.ParquetFile(path), context.tokenizer()
    groups = [reader.read_row_group(i)["tokens"].to_pylist() for i in range(reader.num_row_groups)]
    lengths = [sum(map(len, group)) for group in groups]
    assert all(length >= context.corpus.segment_tokens for length in lengths[:-1])
    tokens = [token for group in groups for row in group for token in row]
    ends = [i for i, token in enumerate(tokens) if token == coder.end_of_text]
    assert ends[-1] == len(tokens) - 1
    return [coder.decode(tokens[a + 1 : b]) for a, b in zip([-1, *ends], ends, strict=False)]


def random_texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [
        f"{i}" + "".join(rng.choices("abcxy 黃😀\x00", k=rng.choice([1, 5, 50, 99, 100, 101, 700])))
        for i in range(count)
    ]


def test_a_draft_has_every_document_of_the_partition(tmp_path: Path) -> None:
    documents = random_texts(200, 0)
    shared, part = make(documents, tmp_path / "d")
    assert part.documents == 200
    found = {shard.split: texts(shared, tmp_path / "d" / "parts" / shard.name) for shard in part.shards}
    assert sorted(found["train"] + found["heldout"]) == sorted(documents)
    for shard in part.shards:
        data = (tmp_path / "d" / "parts" / shard.name).read_bytes()
        assert (shard.digest, shard.file_bytes) == (storage.sha256(data), len(data))
        own = found[shard.split]
        assert (shard.counts.documents, shard.counts.bytes) == (len(own), sum(len(t.encode()) for t in own))
        assert shard.counts.characters == sum(map(len, own))
        assert shard.counts.tokens == sum(shard.segments)
    again, other = make(documents, tmp_path / "e")
    assert other == part and again.directory != shared.directory


def test_a_shard_rewritten_without_repeats_equals_one_that_never_had_them(tmp_path: Path) -> None:
    rng = random.Random(1)
    for trial in range(6):
        documents = random_texts(120, trial)
        repeated = np.array([rng.random() < 0.3 for _ in documents])
        shared, part = make(documents, tmp_path / f"{trial}" / "d")
        result = rewrite(shared, 7, part, {"duplicate": repeated})
        unique = [text for text, removed in zip(documents, repeated, strict=True) if not removed]
        other, expected = make(unique, tmp_path / f"{trial}" / "e")
        assert (result.shards, result.heldout) == (expected.shards, expected.heldout)
        for shard in result.shards:
            path = tmp_path / f"{trial}" / "d" / shard.name
            assert path.read_bytes() == Path(other.work_file(shard.name)).read_bytes()
    nothing = rewrite(shared, 7, part, {"duplicate": np.ones(120, dtype=bool)})
    assert nothing.shards == [] and int(nothing.heldout, 16) == 0


def test_a_draft_that_fails_leaves_no_file(tmp_path: Path) -> None:
    documents = random_texts(5000, 0)
    path = write(tmp_path / "a.txt", "|".join(documents).encode() + b"|\xff")
    corpus = CorpusConfig(sources=[path], separator="|", segment_tokens=100, on_bad="fail")
    [partition] = plan(list_files(corpus).files, corpus)
    with pytest.raises(UserError, match=r"a.txt: not valid UTF-8"):
        shards.draft(context(corpus, tmp_path / "d"), 0, partition)
    assert [p.name for p in (tmp_path / "d").rglob("*") if p.is_file()] == ["tokenizer.json"]
