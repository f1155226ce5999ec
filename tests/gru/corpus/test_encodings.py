import codecs
import gzip
import json
import random
from pathlib import Path

import pytest

from gru.config import CorpusConfig
from gru.errors import UserError
from tests.gru.corpus.reading import AWKWARD, PACKERS, examples, read, spans, texts, write

MARKED = {
    "utf-8": codecs.BOM_UTF8,
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}


@pytest.mark.parametrize("encoding", MARKED)
@pytest.mark.parametrize("suffix", ["", *PACKERS])
def test_a_byte_order_mark_tells_the_encoding_and_is_not_in_the_text(
    tmp_path: Path, encoding: str, suffix: str
) -> None:
    records = [f"{i} 黃河入海流 😀\r\n" for i in range(30)]
    contents = {
        "a.txt": AWKWARD,
        "b.jsonl": "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in records),
        "c.json": json.dumps([{"text": text} for text in records], ensure_ascii=False),
        "d.csv": "text,n\r\n" + "".join(f'"{text}",1\r\n' for text in records),
    }
    pack = PACKERS.get(suffix, bytes)
    for name, content in contents.items():
        path = write(tmp_path / f"{name}{suffix}", pack(MARKED[encoding] + content.encode(encoding)))
        for size in (10**6, 100, 7):
            if name == "a.txt":
                assert "".join(texts(path, partition_bytes=size)) == AWKWARD
            else:
                assert texts(path, partition_bytes=size, encoding="latin-1") == records


def test_a_mark_at_the_start_of_a_document_is_not_in_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "\ufeffone--\ufefftwo--thr\ufeffee".encode())
    for size in (1000, 9, 3, 1):
        assert texts(path, separator="--", partition_bytes=size) == ["one", "two", "thr\ufeffee"]
    found, report = read(write(tmp_path / "b.txt", codecs.BOM_UTF8))
    assert not found and report.dropped == {"empty": 1}


def test_utf16_without_a_mark_is_refused_by_name_and_read_when_named(tmp_path: Path) -> None:
    for encoding in ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"):
        data = "One line.\nAnother line with 黃.\n".encode(encoding)
        for path in (
            write(tmp_path / "a.txt", data),
            write(tmp_path / "b.jsonl", data),
            write(tmp_path / "c.txt.gz", gzip.compress(data)),
        ):
            for size in (1000, 20):
                found, report = read(path, partition_bytes=size)
                assert not found and report.dropped == {"unreadable": 1}
                [example] = examples(report)
                assert encoding.upper() in example and f'corpus.encoding = "{encoding}"' in example
            if not path.endswith(".gz"):
                assert read(path, heldout="tail", heldout_share=0.3)[1].dropped == {"unreadable": 1}
            with pytest.raises(UserError, match=encoding.upper()):
                read(path, on_bad="fail")
        assert "".join(texts(path, encoding=encoding)) == "One line.\nAnother line with 黃.\n"
    found, report = read(path, encoding="utf-16")
    assert not found and "set `encoding` to utf-16-le or utf-16-be" in examples(report)[0]
    nuls = write(tmp_path / "d.txt", b"a\0b\0c\0d\0")
    assert texts(nuls, separator="\0") == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    "encoding", ["latin-1", "cp1252", "koi8-r", "gb18030", "shift_jis", "big5", "euc_kr", "utf-16"]
)
def test_other_encodings_are_read_as_named_for_every_cut(tmp_path: Path, encoding: str) -> None:
    sample = {
        "latin-1": "été",
        "cp1252": "œuf “a”",
        "koi8-r": "привет",
        "gb18030": "黃河入海流",
        "shift_jis": "日本語のテキスト",
        "big5": "黃河入海流",
        "euc_kr": "한국어",
        "utf-16": "été 😀",
    }[encoding]
    text = "".join(f"{sample} {i}\n\n" for i in range(9))
    path = write(tmp_path / "a.txt", text.encode(encoding))
    table = write(tmp_path / "b.csv", f"{sample[0]},text\n1,{sample}\n2,x\n".encode(encoding))
    for size in [*range(1, 40, 7), 1000]:
        for heldout in ({}, {"heldout": "tail", "heldout_share": 0.3}):
            settings = {"encoding": encoding, "partition_bytes": size, **heldout}
            assert "".join(texts(path, **settings)) == text
            assert texts(path, separator="\n\n", **settings) == [f"{sample} {i}" for i in range(9)]
        assert texts(table, encoding=encoding, partition_bytes=size) == [sample, "x"]


def test_bytes_that_are_not_of_the_encoding_are_dropped_replaced_or_refused_with_their_place(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "一--二".encode("gb18030") + b"\xff--" + "三".encode("gb18030"))
    settings = {"encoding": "gb18030", "separator": "--"}
    found, report = read(path, **settings)
    assert (found, report.dropped) == (["一", "三"], {"invalid_utf8": 1})
    assert examples(report) == ["a.txt: not valid GB18030 at byte 8 of its text as UTF-8"]
    found, report = read(path, on_bad="replace", **settings)
    assert (found, report.replaced, report.dropped) == (["一", "二\ufffd", "三"], 1, {})
    with pytest.raises(UserError, match=r"a.txt: not valid GB18030 at byte 8"):
        read(path, on_bad="fail", **settings)
    odd = write(tmp_path / "b.txt", "one\ntwo \ud800 lone\n三\n".encode("utf-16", "surrogatepass") + b"x")
    found, report = read(odd, on_bad="replace")
    assert found == ["one\ntwo \ufffd lone\n三\n\ufffd"] and report.replaced == 1


@pytest.mark.parametrize("encoding", ["utf-9", "", "hex", "idna", "punycode", "undefined", "rot13", "a\0b"])
def test_an_encoding_that_python_does_not_know_is_refused_before_files_are_listed(
    tmp_path: Path, encoding: str
) -> None:
    with pytest.raises(UserError, match=r"^corpus.encoding = .*: is not an encoding of text that Python knows"):
        read(str(tmp_path / "absent.txt"), encoding=encoding)


def test_random_bytes_in_any_encoding_are_text_or_counted(tmp_path: Path) -> None:
    rng = random.Random(0)
    for trial in range(40):
        data = rng.randbytes(rng.randrange(1, 3000))
        for name in ("a.txt", "b.jsonl", "c.csv", "d.txt.gz"):
            path = write(tmp_path / str(trial) / name, gzip.compress(data) if name.endswith("gz") else data)
            for encoding in ("utf-8", "utf-16", "utf-32", "utf-7", "unicode_escape", "shift_jis", "iso2022_jp"):
                found, _ = read(path, encoding=encoding, separator="\n", on_bad="replace")
                assert all(text.encode() for text in found)


def test_a_file_in_another_encoding_is_cut_only_at_the_held_out_tail(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", ("a line\n" * 1000).encode("utf-16"))
    assert len(spans(CorpusConfig(sources=[path], partition_bytes=1000))) == 1
    assert len(spans(CorpusConfig(sources=[path], partition_bytes=1000, heldout="tail"))) == 2
