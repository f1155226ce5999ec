import gzip
from pathlib import Path

import pytest

from gru.config import CorpusConfig
from gru.corpus.documents import documents, is_heldout
from gru.corpus.listing import list_files
from gru.corpus.partitions import describe_plan, plan
from gru.corpus.report import Report
from gru.errors import UserError
from tests.gru.corpus.reading import read, spans, write


def test_a_tail_of_one_file_is_held_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"0123456789\n" * 100)
    write(tmp_path / "empty.txt", b"")
    corpus = CorpusConfig(sources=[path, f"{tmp_path}/empty.txt"], heldout="tail")
    assert [(span.start, span.end, span.heldout) for span in spans(corpus)] == [
        (0, 1089, False),
        (1089, 1100, True),
        (0, 0, False),
    ]
    nothing = CorpusConfig(sources=[f"{tmp_path}/empty.txt"], heldout="tail")
    assert [span.size for span in spans(nothing)] == [0]


def test_small_files_share_partitions_in_order(tmp_path: Path) -> None:
    for i in range(100):
        write(tmp_path / f"{i:03}.txt", b"x" * 10)
    corpus = CorpusConfig(sources=[str(tmp_path)], partition_bytes=100)
    partitions = plan(list_files(corpus).files, corpus)
    assert [len(p) for p in partitions] == [10] * 10
    assert [s.file.name for p in partitions for s in p] == [f"{i:03}.txt" for i in range(100)]


def test_the_plan_counts_files_that_cannot_be_cut(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", b"x\n" * 500)
    write(tmp_path / "b.txt.gz", gzip.compress(b"x"))
    write(tmp_path / "c.json", b"[]")
    corpus = CorpusConfig(sources=[str(tmp_path)], partition_bytes=100)
    line = describe_plan(plan(list_files(corpus).files, corpus))
    assert line.startswith(
        "3 files, 0.0 MB, 11 partitions; 2 files cannot be cut (compressed, .json, .html, archives, or"
    )


def test_held_out_tail_is_cut_at_a_line(tmp_path: Path) -> None:
    lines = [f"line {i:04}\n" for i in range(1000)]
    write(tmp_path / "a.txt", "".join(lines[:900]).encode())
    write(tmp_path / "b.txt", "".join(lines[900:]).encode())
    corpus = CorpusConfig(sources=[str(tmp_path)], heldout="tail", heldout_share=0.25, partition_bytes=999)
    found: dict[bool, str] = {False: "", True: ""}
    for span in spans(corpus):
        for text in documents(span, corpus, Report()):
            found[is_heldout(span, 0, corpus)] += text
    assert found[False] + found[True] == "".join(lines)
    assert found[True].splitlines()[0] in ("line 0750", "line 0751")
    path = write(tmp_path / "c.txt.gz", gzip.compress(b"x"))
    with pytest.raises(UserError, match=r'corpus\.heldout = "tail".*use "hash"'):
        read(path, heldout="tail")


def test_a_large_csv_file_that_cannot_be_read_is_a_user_error(tmp_path: Path) -> None:
    path = Path(write(tmp_path / "a.csv", b"text,n\n" + b"a field,1\n" * 100))
    corpus = CorpusConfig(sources=[str(path)], partition_bytes=200)
    files = list_files(corpus).files
    path.unlink()
    with pytest.raises(UserError, match=r"a\.csv: cannot be read: No such file"):
        plan(files, corpus)
