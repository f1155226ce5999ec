import random
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from gru import storage
from gru.config import CorpusConfig, TokenizerConfig
from gru.corpus import shards, sources, tokenizer
from gru.corpus.shards import PartitionResult, ShardContext
from gru.errors import UserError
from tests.gru.corpus.reading import write


def context(corpus: CorpusConfig, directory: Path, parallel: bool = False) -> ShardContext:
    made = tokenizer.train_tokenizer(TokenizerConfig(kind="char"), ["abcxy \n"])
    storage.write_bytes(str(directory / "tokenizer.json"), made.json)
    return ShardContext(str(directory), corpus, made.digest, parallel)


def make(texts: list[str], directory: Path, **settings: object) -> tuple[ShardContext, PartitionResult]:
    path = write(directory.parent / "a.txt", "|".join(texts).encode())
    corpus = CorpusConfig(sources=[path], separator="|", **{"segment_tokens": 100, "heldout_share": 0.3, **settings})
    [partition] = sources.plan(sources.list_files(corpus), corpus)
    made = context(corpus, directory)
    return made, shards.draft(made, 7, partition)


def texts(context: ShardContext, path: Path) -> list[str]:
    """The documents of a shard; asserts that its row groups are as long as they should be."""
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
    given = random_texts(200, 0)
    made, part = make(given, tmp_path / "d")
    assert part.documents == 200
    found = {shard.split: texts(made, tmp_path / "d" / "parts" / shard.name) for shard in part.shards}
    assert sorted(found["train"] + found["heldout"]) == sorted(given)
    for shard in part.shards:
        data = (tmp_path / "d" / "parts" / shard.name).read_bytes()
        assert (shard.digest, shard.file_bytes) == (storage.sha256(data), len(data))
        own = found[shard.split]
        assert (shard.counts.documents, shard.counts.bytes) == (len(own), sum(len(t.encode()) for t in own))
        assert shard.counts.characters == sum(map(len, own))
        assert shard.counts.tokens == sum(shard.segments)
    again, other = make(given, tmp_path / "e")
    assert other == part and again.directory != made.directory


def test_without_its_repeats_a_shard_is_as_if_they_had_never_been_there(tmp_path: Path) -> None:
    rng = random.Random(1)
    for trial in range(6):
        given = random_texts(120, trial)
        gone = np.array([rng.random() < 0.3 for _ in given])
        made, part = make(given, tmp_path / f"{trial}" / "d")
        left = shards.rewrite_without(made, 7, part, gone)
        stay = [text for text, goes in zip(given, gone, strict=True) if not goes]
        other, expected = make(stay, tmp_path / f"{trial}" / "e")
        assert (left.shards, left.heldout) == (expected.shards, expected.heldout)
        for shard in left.shards:
            path = tmp_path / f"{trial}" / "d" / shard.name
            assert path.read_bytes() == Path(other.part_file(shard.name)).read_bytes()
    everything = shards.rewrite_without(made, 7, part, np.ones(120, dtype=bool))
    assert everything.shards == [] and int(everything.heldout, 16) == 0


def test_a_draft_that_fails_leaves_no_file(tmp_path: Path) -> None:
    given = random_texts(5000, 0)
    path = write(tmp_path / "a.txt", "|".join(given).encode() + b"|\xff")
    corpus = CorpusConfig(sources=[path], separator="|", segment_tokens=100, on_bad="fail")
    [partition] = sources.plan(sources.list_files(corpus), corpus)
    with pytest.raises(UserError, match=r"a.txt: not valid UTF-8"):
        shards.draft(context(corpus, tmp_path / "d"), 0, partition)
    assert [p.name for p in (tmp_path / "d").rglob("*") if p.is_file()] == ["tokenizer.json"]
