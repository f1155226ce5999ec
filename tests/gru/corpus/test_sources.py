import gzip
import io
import json
import random
from collections import Counter
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gru.config import CorpusConfig
from gru.corpus import sources
from gru.errors import UserError


def read(corpus: CorpusConfig) -> tuple[list[str], Counter[str]]:
    dropped: Counter[str] = Counter()
    spans = [span for partition in sources.plan(sources.list_files(corpus), corpus) for span in partition]
    return [text for span in spans for _, text in sources.documents(span, corpus, dropped)], dropped


def write(path: Path, data: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path)


AWKWARD = "one\r\ntwo\u2028still two\x0cand\n\n\n😀 emoji\n黃河入海流\r\n\u2029x\ry\nno end of line"


@pytest.mark.parametrize("size", range(1, len(AWKWARD.encode()) + 2))
def test_ranges_of_text_join_to_the_file_for_every_cut(tmp_path: Path, size: int) -> None:
    path = write(tmp_path / "a.txt", AWKWARD.encode())
    texts, dropped = read(CorpusConfig(sources=[path], partition_bytes=size))
    assert "".join(texts) == AWKWARD and not dropped
    assert all(text.endswith("\n") for text in texts[:-1])


def test_ranges_of_random_lines_join_to_the_file(tmp_path: Path) -> None:
    rng = random.Random(0)
    for trial in range(30):
        text = "".join(rng.choices("a\n\r\u2028é黃😀", k=rng.randrange(1, 300)))
        path = write(tmp_path / f"{trial}.txt", text.encode())
        for _ in range(10):
            corpus = CorpusConfig(sources=[path], partition_bytes=rng.randrange(1, 400))
            assert "".join(read(corpus)[0]) == text


def test_ranges_of_json_lines_have_every_record_once(tmp_path: Path) -> None:
    records = [{"text": f"{i} \u2028 黃😀"} for i in range(40)]
    data = "\r\n".join(json.dumps(r, ensure_ascii=i % 2 == 0) for i, r in enumerate(records)).encode()
    path = write(tmp_path / "a.jsonl", data)
    for size in [1, 7, 64, 100, 1000, 10**6]:
        texts, _ = read(CorpusConfig(sources=[path], partition_bytes=size))
        assert texts == [record["text"] for record in records]


def test_span_digest_of_a_whole_file_is_its_sha256_and_the_ranges_cover_it(tmp_path: Path) -> None:
    import hashlib

    path = write(tmp_path / "a.txt", AWKWARD.encode())
    corpus = CorpusConfig(sources=[path])
    ((span,),) = sources.plan(sources.list_files(corpus), corpus)
    assert sources.span_digest(span) == hashlib.sha256(AWKWARD.encode()).digest()
    corpus = CorpusConfig(sources=[path], partition_bytes=20)
    texts = read(corpus)[0]
    spans = [s for p in sources.plan(sources.list_files(corpus), corpus) for s in p]
    digests = [sources.span_digest(s) for s in spans if [*sources.documents(s, corpus, Counter())]]
    assert digests == [hashlib.sha256(text.encode()).digest() for text in texts]


def test_small_files_share_partitions_in_order(tmp_path: Path) -> None:
    for i in range(100):
        write(tmp_path / f"{i:03}.txt", b"x" * 10)
    corpus = CorpusConfig(sources=[str(tmp_path)], partition_bytes=100)
    partitions = sources.plan(sources.list_files(corpus), corpus)
    assert [len(p) for p in partitions] == [10] * 10
    assert [s.file.name for p in partitions for s in p] == [f"{i:03}.txt" for i in range(100)]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_compressed_files_of_several_frames_are_read_whole(tmp_path: Path, suffix: str) -> None:
    def pack(data: bytes) -> bytes:
        if suffix == ".zst":
            return pa.compress(data, codec="zstd", asbytes=True)
        return gzip.compress(data) if suffix else data

    lines = [json.dumps({"text": f"{i} 黃"}).encode() + b"\n" for i in range(5000)]
    half = b"".join(lines[:2500])
    data = pack(half) + pack(b"".join(lines[2500:]))
    path = write(tmp_path / f"a.jsonl{suffix}", data)
    assert read(CorpusConfig(sources=[path], partition_bytes=1000))[0] == [f"{i} 黃" for i in range(5000)]
    path = write(tmp_path / f"b.txt{suffix}", pack(AWKWARD.encode()))
    assert read(CorpusConfig(sources=[path]))[0] == [AWKWARD]
    rows = io.BytesIO()
    pq.write_table(pa.table({"text": ["one", "黃"]}), rows)
    path = write(tmp_path / f"c.parquet{suffix}", pack(rows.getvalue()))
    assert read(CorpusConfig(sources=[path]))[0] == ["one", "黃"]
    if suffix:
        path = write(tmp_path / f"cut.jsonl{suffix}", data[:-4])
        with pytest.raises(UserError, match=f"cut.jsonl{suffix}: cannot be read: .*[Tt]runcated"):
            read(CorpusConfig(sources=[path]))
        path = write(tmp_path / f"not.txt{suffix}", b"plain text all along, and no magic number")
        with pytest.raises(UserError, match=f"not.txt{suffix}: cannot be read"):
            read(CorpusConfig(sources=[path]))


def test_compressed_text_larger_than_a_partition_is_cut_at_lines(tmp_path: Path) -> None:
    text = "".join(f"{i} 黃河\n" for i in range(500))
    path = write(tmp_path / "a.txt.gz", gzip.compress(text.encode()))
    documents = read(CorpusConfig(sources=[path], partition_bytes=1000))[0]
    assert len(documents) > 5
    assert "".join(documents) == text
    assert all(document.endswith("\n") for document in documents)


def test_invalid_utf8_is_reported_with_its_place_in_the_file(tmp_path: Path) -> None:
    data = "黃\n".encode() * 50
    data = data[:120] + b"\xff" + data[120:]
    for size in [7, 1000]:
        path = write(tmp_path / "a.txt", data)
        with pytest.raises(UserError, match=r"a.txt: not valid UTF-8 at byte 120$"):
            read(CorpusConfig(sources=[path], partition_bytes=size))
    path = write(tmp_path / "a.txt.gz", gzip.compress(data))
    with pytest.raises(UserError, match=r"a.txt.gz: not valid UTF-8 at byte 120 of the decompressed text"):
        read(CorpusConfig(sources=[path]))
    path = write(tmp_path / "a.jsonl", b'{"text": "ok"}\n{"text": "\xff"}\n')
    with pytest.raises(UserError, match=r"a.jsonl: not valid UTF-8 at byte 25$"):
        read(CorpusConfig(sources=[path]))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'text': 1}", "the line at byte 14 is not valid JSON"),
        ("[1]", "the line at byte 14 is not a JSON object"),
        ('{"text": {}}', "field 'text' is dict"),
        (r'{"text": "\ud83d"}', "lone surrogate"),
    ],
)
def test_bad_json_is_reported_with_its_place(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "a.jsonl", f'{{"text": "a"}}\n{line}\n'.encode())
    with pytest.raises(UserError, match=f"a.jsonl: .*{message}"):
        read(CorpusConfig(sources=[path]))


def test_template_fills_fields_and_counts_what_is_dropped(tmp_path: Path) -> None:
    records = [
        {"title": "t", "lines": ["a", "b"], "n": 3},
        {"title": "t", "n": 1},
        {"title": None, "lines": [], "n": 1},
        {"title": "{n}", "lines": [], "n": 0.5},
    ]
    path = write(tmp_path / "a.ndjson", "\n\n".join(map(json.dumps, records)).encode())
    texts, dropped = read(CorpusConfig(sources=[path], template="{{{title}}}\n{n}: {lines}"))
    assert texts == ["{t}\n3: a\nb", "{{n}}\n0.5: "]
    assert dropped == {"missing_field": 2}
    path = write(tmp_path / "b.jsonl", b'{"text": ""}\n{"text": "x"}\n')
    assert read(CorpusConfig(sources=[path])) == (["x"], {"empty": 1})
    for template in ["no field", "{", "{a:>3}", "{a!r}"]:
        with pytest.raises(UserError, match=r"corpus\.template"):
            read(CorpusConfig(sources=[path], template=template))


def test_parquet_rows_are_documents(tmp_path: Path) -> None:
    table = pa.table({"title": ["a", None, "c"], "text": [["1", "2"], ["3"], []], "other": [1, 2, 3]})
    path = str(tmp_path / "a.parquet")
    pq.write_table(table, path)
    texts, dropped = read(CorpusConfig(sources=[path], template="{title}:{text}"))
    assert (texts, dropped) == (["a:1\n2", "c:"], {"missing_field": 1})
    with pytest.raises(UserError, match=r"a.parquet: has no column 'body', which corpus\.template names"):
        read(CorpusConfig(sources=[path], template="{body}"))
    path = write(tmp_path / "b.parquet", b"not parquet, though long enough to look at")
    with pytest.raises(UserError, match=r"b.parquet: cannot be read"):
        read(CorpusConfig(sources=[path]))


def test_sources_are_files_directories_globs_and_urls(tmp_path: Path) -> None:
    for name in ["d/b.txt", "d/a/z.TXT", "d/c.jsonl.gz", "d/readme.md", "d/.git/x.txt", "d/photo.png", "e.c"]:
        write(tmp_path / name, b"x")

    def names(*given: str, format: str = "auto") -> list[str]:
        return [f.name for f in sources.list_files(CorpusConfig(sources=[*given], format=format))]

    d = str(tmp_path / "d")
    assert names(d) == ["a/z.TXT", "b.txt", "c.jsonl.gz"]
    assert names(d, format="text") == ["a/z.TXT", "b.txt", "readme.md"]
    assert names(f"{tmp_path}/e.c", d)[0] == "e.c"
    assert names(f"{d}/**/*.md", f"{d}/readme.md") == ["readme.md"]
    assert names(f"{d}/photo.png", format="text") == ["photo.png"]
    for given, message in [
        (f"{tmp_path}/absent.txt", r"corpus\.sources: no such file: .*absent.txt"),
        (f"{tmp_path}/*.absent", "no such file"),
        (f"{d}/photo.png", r"photo.png: .*corpus\.format"),
        ("nonsense://x/y.txt", "cannot read nonsense"),
    ]:
        with pytest.raises(UserError, match=message):
            names(given)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="nothing to read"):
        names(str(tmp_path / "empty"))
    fsspec.filesystem("memory").pipe("/corpus/sub/a.txt", b"from\nmemory")
    assert read(CorpusConfig(sources=["memory://corpus"], partition_bytes=5))[0] == ["from\n", "memory"]
    assert names("memory://corpus/**/*.txt") == ["sub/a.txt"]


def test_the_standard_library_is_a_corpus() -> None:
    corpus = CorpusConfig(sources=["python-stdlib"])
    names = [file.name for file in sources.list_files(corpus)]
    assert "asyncio/base_events.py" in names and names == sorted(set(names), key=Path)
    assert not any("site-packages" in name or "/tests/" in name for name in names)
    assert sum(map(len, read(corpus)[0])) > 5_000_000


def test_held_out_tail_is_cut_at_a_line(tmp_path: Path) -> None:
    lines = [f"line {i:04}\n" for i in range(1000)]
    write(tmp_path / "a.txt", "".join(lines[:900]).encode())
    write(tmp_path / "b.txt", "".join(lines[900:]).encode())
    corpus = CorpusConfig(sources=[str(tmp_path)], heldout="tail", heldout_share=0.25, partition_bytes=999)
    spans = [span for partition in sources.plan(sources.list_files(corpus), corpus) for span in partition]
    texts: dict[bool, str] = {False: "", True: ""}
    for span in spans:
        for _, text in sources.documents(span, corpus, Counter()):
            texts[sources.is_heldout(span, 0, corpus)] += text
    assert texts[False] + texts[True] == "".join(lines)
    assert texts[True].splitlines()[0] in ("line 0750", "line 0751")
    path = write(tmp_path / "c.txt.gz", gzip.compress(b"x"))
    with pytest.raises(UserError, match=r'corpus\.heldout = "tail".*use "hash"'):
        read(CorpusConfig(sources=[path], heldout="tail"))
