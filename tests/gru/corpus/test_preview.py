import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gru.config import CorpusConfig, TokenizerConfig
from gru.corpus.preview import Preview, look
from gru.errors import UserError
from tests.gru.corpus.reading import PACKERS, write, zstd

BYTES = TokenizerConfig(kind="byte")
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
WORDS = ["crow", "fox", "黃河", "said", "oak", "under", "入海流", "good", "day"]


def preview(*paths: str, tokenizer: TokenizerConfig = BYTES, **settings: Any) -> Preview:
    return look(CorpusConfig.model_validate({"sources": [*paths], **settings}), tokenizer, cores=2)


def json_lines(records: list[Any]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Documents of 12 MB in all, of very different lengths."""
    rng = random.Random(0)
    return [f"{index} {' '.join(rng.choices(WORDS, k=rng.choice([5, 50, 300, 1000])))}" for index in range(6000)]


def as_json_lines(texts: list[str]) -> bytes:
    return json_lines([{"text": text, "id": index} for index, text in enumerate(texts)])


def as_parquet(texts: list[str]) -> bytes:
    sink = pa.BufferOutputStream()
    # Without compression or a dictionary, the file is large enough to be sampled.
    pq.write_table(pa.table({"text": texts}), sink, row_group_size=300, compression="none", use_dictionary=False)
    return sink.getvalue().to_pybytes()


LARGE: dict[str, Callable[[list[str]], bytes]] = {
    "a.jsonl": as_json_lines,
    "a.jsonl.gz": lambda texts: gzip.compress(as_json_lines(texts), 1),
    "a.jsonl.zst": lambda texts: zstd(as_json_lines(texts)),
    "a.json": lambda texts: b"[" + as_json_lines(texts).strip().replace(b"\n", b",") + b"]",
    "a.csv": lambda texts: ('text,id\n"' + '","1"\n"'.join(f"{text}\n" for text in texts) + '","1"\n').encode(),
    "a.parquet": as_parquet,
    "a.txt": lambda texts: "\n\n".join(texts).encode(),
}


@pytest.mark.parametrize("name", LARGE)
def test_the_size_of_a_large_file_is_known_from_a_sample(name: str, texts: list[str], tmp_path: Path) -> None:
    path = write(tmp_path / name, LARGE[name](texts))
    found = preview(path, separator="\n\n" if name == "a.txt" else None)
    [source] = found.sources
    assert not source.complete
    assert 0 < source.sampled_documents < len(texts)
    assert found.expected.documents == pytest.approx(len(texts), rel=0.1)
    size = sum(len(text.encode()) for text in texts)
    assert found.expected.bytes == pytest.approx(size, rel=0.1)
    assert found.expected.tokens == pytest.approx(size + len(texts), rel=0.1)
    assert source.dropped == {}
    assert len(source.shown) == 5


def test_a_long_text_is_cut_into_documents_of_a_partition(tmp_path: Path) -> None:
    path = write(tmp_path / "novel.txt", b"A crow met a fox.\n" * 800_000)
    found = preview(path, partition_bytes=2_000_000, deduplicate="none")
    assert found.expected.documents == 8
    assert found.expected.bytes == pytest.approx(18 * 800_000, rel=0.01)
    assert {document.characters for document in found.sources[0].shown} == {None}, "only a part of each is read"


def test_many_small_files_are_sampled(tmp_path: Path) -> None:
    for index in range(700):
        write(tmp_path / f"{index}.txt", f"{index} ".encode() * 5000)
    found = preview(str(tmp_path))
    [source] = found.sources
    assert found.expected.documents == pytest.approx(700, rel=0.01)
    assert len({document.file for document in source.shown}) == 5


def folder(path: Path) -> str:
    write(path / "array.json", json.dumps([{"text": f"item {index}"} for index in range(50)]).encode())
    write(path / "lines.jsonl", json_lines([{"text": f"line {i}", "title": None, "meta": {"n": i}} for i in range(90)]))
    write(path / "empty_title.jsonl", json_lines([{"text": f"other {i}", "title": ""} for i in range(10)]))
    write(path / "bad.jsonl", b'{"title": "x"}\n{broken\n')
    for compression, pack in PACKERS.items():
        write(path / f"packed.jsonl{compression}", pack(json_lines([{"text": f"packed{compression}"}])))
    write(path / "note.txt", b"a note\n")
    write(path / "latin.txt", "na\xefve".encode("latin-1"))
    write(path / "table.csv", b'text,id\n"one, two",1\nthree,2\n')
    pq.write_table(pa.table({"text": ["p", "q"], "lang": [None, "en"]}), path / "rows.parquet")
    return str(path)


def test_a_folder_of_all_formats(tmp_path: Path) -> None:
    found = preview(folder(tmp_path / "folder"))
    [source] = found.sources
    assert source.complete
    packed = {f"jsonl{compression}": 1 for compression in PACKERS}
    assert source.files == {"json": 1, "jsonl": 3, "text": 2, "csv": 1, "parquet": 1, **packed}
    assert source.sampled_documents == found.expected.documents == 50 + 90 + 10 + 4 + 1 + 2 + 2
    assert source.dropped == {"missing_field": 1, "bad_record": 1, "invalid_utf8": 1}
    assert [examples[0].split(":")[0] for examples in source.examples.values()].count("bad.jsonl") == 2
    assert "not valid UTF-8 at byte 2" in source.examples["invalid_utf8"][0]
    empty = source.empty_fields
    assert empty["lang"] == 0.5
    assert empty["title"] == pytest.approx(1, abs=0.01), "only the record without text has one"
    assert {"text", "meta.n", "id"} <= set(empty)
    assert source.template == "{text}"
    assert len({document.file for document in source.shown}) == 5


def test_nothing_of_text_files_is_told_about_records(tmp_path: Path) -> None:
    [source] = preview(write(tmp_path / "a.txt", b"a crow")).sources
    assert (source.template, source.empty_fields) == (None, {})
    assert [(document.text, document.characters) for document in source.shown] == [("a crow", 6)]


def test_each_source_has_its_own_section(tmp_path: Path) -> None:
    notes = write(tmp_path / "notes.jsonl", json_lines([{"text": f"note {i}"} for i in range(4)]))
    poems = write(
        tmp_path / "poems.jsonl", json_lines([{"title": f"title {i}", "lines": ["a", "b"]} for i in range(9)])
    )
    table = {"path": poems, "template": "{title}\n{lines}", "weight": 2.0, "limit": 6}
    found = preview(notes, source=[table])
    first, second = found.sources
    assert (first.key, first.weight, first.expected.documents) == ("corpus.sources", 1.0, 4)
    assert (second.key, second.weight, second.expected.documents) == ("corpus.source.0", 2.0, 6), "its limit"
    assert second.shown[0].text.endswith("\na\nb")
    assert found.expected.documents == 10
    assert found.expected.tokens == found.expected.bytes + 10


def test_duplicates_are_left_out_of_the_sample(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", json_lines([{"text": "one"}, {"text": "two"}, {"text": "one"}]))
    found = preview(path)
    assert found.sources[0].dropped == {"duplicate": 1}
    assert found.expected.documents == 2
    assert preview(path, deduplicate="none").expected.documents == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "{text"}, r"corpus\.template = .*expected '}'"),
        (
            {"template": "{Text}"},
            r"no document to train on in .*a\.jsonl; 1 dropped: missing_field; a\.jsonl: .*'Text'",
        ),
        ({"template": "{Text}", "on_bad": "fail"}, r"a\.jsonl: .*'Text'"),
        ({"min_characters": 50}, r"no document to train on in .*a\.jsonl; 1 dropped: too_short"),
        ({"source": [{"path": "absent"}]}, r"no such file: absent"),
    ],
)
def test_a_mistake_is_reported_as_by_prepare(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", json_lines([{"text": "a crow"}]))
    with pytest.raises(UserError, match=message):
        preview(path, **settings).require_documents()


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json"])
def test_a_wrong_template_is_seen_without_reading_all(name: str, texts: list[str], tmp_path: Path) -> None:
    path = write(tmp_path / name, LARGE[name](texts * 2))
    [source] = preview(path, template="{Text}").sources
    assert 0 < source.dropped["missing_field"] < 1.5 * len(texts)
    assert source.empty_fields == {"text": 0.0, "id": 0.0}


def test_no_time_is_no_mistake(tmp_path: Path) -> None:
    corpus = CorpusConfig(sources=[write(tmp_path / "a.jsonl", json_lines([{"text": "a crow"}]))])
    found = look(corpus, BYTES, cores=2, seconds=0)
    found.require_documents()
    assert (found.sources[0].complete, found.expected.documents) == (False, 0)


def test_the_end_of_a_document_is_not_looked_for_too_far(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"text": "' + b"a" * 70_000_000 + b'"}\n')
    found = preview(path)
    found.require_documents()
    assert (found.sources[0].complete, found.sources[0].sampled_documents) == (False, 0)


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_tokens_are_those_of_a_tokenizer_of_the_sample(kind: Any, texts: list[str], tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", as_json_lines(texts[:600]))
    found = preview(path, tokenizer=TokenizerConfig(kind=kind, vocab_size=400))
    assert found.bytes_per_token > 1.2
    assert found.seconds > 0


@pytest.mark.parametrize("alphabet", ["0123456789abcdef", LETTERS], ids=["hexadecimal", "letters"])
def test_random_text_without_spaces_has_tokens(alphabet: str, tmp_path: Path) -> None:
    # With the trainer of `prepare` and this vocabulary, even a tenth of the text takes minutes.
    text = "".join(random.Random(0).choices(alphabet, k=600_000))
    found = preview(write(tmp_path / "a.txt", text.encode()), tokenizer=TokenizerConfig(vocab_size=30_000))
    assert 1.5 < found.bytes_per_token < 5


def test_repeated_documents_take_no_longer_than_others(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", json_lines([{"text": "the same text"}] * 50_000))
    assert preview(path).expected.seconds < 30
