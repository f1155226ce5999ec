import gzip
import json
import random
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gru.config import CorpusConfig
from gru.corpus.documents import document_hash
from gru.corpus.listing import list_files
from gru.corpus.partitions import plan
from gru.corpus.tokenizer_sample import sample
from tests.gru.corpus.reading import PACKERS, write


def sample_of(path: Path, size: int, **settings: object) -> list[str]:
    corpus = CorpusConfig(sources=[str(path)], **settings)
    return list(sample(corpus, size, plan(list_files(corpus).files, corpus)))


def test_the_sample_comes_from_all_over_the_corpus_but_not_from_what_is_held_out(tmp_path: Path) -> None:
    for i in range(10):
        lines = "".join(json.dumps({"text": f"{i} {j}" + "x" * 90}) + "\n" for j in range(1000)).encode()
        write(tmp_path / f"{i}.jsonl.gz", gzip.compress(lines, 1))

    def sampled(size: int) -> list[str]:
        return sample_of(tmp_path, size, heldout_share=0.5)

    assert len({text.split()[0] for text in sampled(20_000)}) >= 5
    assert sampled(20_000) == sampled(20_000)
    assert all(document_hash(text.encode()) >= 2**63 for text in sampled(10**9))
    assert len(sampled(10**9)) == pytest.approx(5000, rel=0.1)


def test_text_files_that_are_held_out_are_not_sampled(tmp_path: Path) -> None:
    for i in range(200):
        write(tmp_path / f"{i}.txt", f"file {i}".encode())
    found = sample_of(tmp_path, 10**6, heldout_share=0.5)
    assert sorted(found) == sorted(t for i in range(200) if document_hash((t := f"file {i}").encode()) >= 2**63)


@pytest.mark.parametrize("name", ["text8.txt", "text8.txt.gz", "text8.txt.zst", "text8.txt.xz", "one.jsonl"])
def test_one_long_line_or_document_is_sampled_from_all_over(tmp_path: Path, name: str) -> None:
    rng = random.Random(0)
    text = " ".join(f"{tenth}{rng.getrandbits(40):010x}" for tenth in "ghijklmnop" for _ in range(25_000))
    data = json.dumps({"text": text}).encode() if name == "one.jsonl" else text.encode()
    suffix = Path(name).suffix
    write(tmp_path / name, PACKERS[suffix](data) if suffix in PACKERS else data)
    size = 300_000
    found = sample_of(tmp_path / name, size, heldout_share=1e-9, partition_bytes=600_000)
    assert size / 3 < sum(map(len, found)) < size * 1.5
    tenths = Counter(word[0] for piece in found for word in piece.split()[1:])
    assert len([tenth for tenth in "ghijklmnop" if tenths[tenth] > size / 11 / 40]) == 10, tenths


@pytest.mark.parametrize("kind", ["utf-16", "parquet", "parquet cut finely"])
def test_a_file_of_which_few_spans_have_text_is_sampled(tmp_path: Path, kind: str) -> None:
    lines = [f"line {index} of this text" for index in range(20_000)]
    if kind == "utf-16":
        path = Path(write(tmp_path / "a.txt", "\n".join(lines).encode("utf-16")))
    else:
        path = tmp_path / "a.parquet"
        table = pa.table({"text": lines})
        pq.write_table(table, path, row_group_size=10_000, compression="none", use_dictionary=False)
    size = 1 << (12 if kind == "parquet cut finely" else 16)
    found = sum(map(len, sample_of(path, 50_000, heldout_share=1e-9, partition_bytes=size)))
    assert 20_000 < found < 80_000
