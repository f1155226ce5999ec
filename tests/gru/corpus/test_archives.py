import gzip
import hashlib
import io
import json
import random
import re
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gru.errors import UserError
from tests.gru.corpus.reading import PACKERS, examples, read, texts, write

PARQUET = io.BytesIO()
pq.write_table(pa.table({"text": ["row one", "row two"]}), PARQUET)
MEMBERS = {
    "notes.txt": "the notes\nof 黃河\n".encode(),
    "deep/er/a.jsonl": b'{"text": "record a"}\n{"text": "record b"}\n',
    "deep/b.json": b'[{"text": "item"}]',
    "deep/c.csv.gz": gzip.compress(b"text,n\nfield,1\n"),
    "deep/d.parquet": PARQUET.getvalue(),
    "e.txt": "in UTF-16\n".encode("utf-16"),
    ".hidden/f.txt": b"hidden",
    "__MACOSX/._g.txt": b"hidden",
    "h.jpg": b"\xff\xd8",
    "i.zip": b"PK",
    "j.py": b"print(1)\n",
    "README": b"no extension",
}
TEXTS = ["the notes\nof 黃河\n", "record a", "record b", "item", "field", "row one", "row two", "in UTF-16\n"]


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.mkdir("deep")
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def tarred(members: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for name, data in {"deep": None, **members, "link.txt": ""}.items():
            info = tarfile.TarInfo(f"./{name}")
            if isinstance(data, bytes):
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
            else:
                info.type, info.linkname = (tarfile.DIRTYPE, "") if data is None else (tarfile.SYMTYPE, "notes.txt")
                archive.addfile(info)
    return buffer.getvalue()


ARCHIVES = {
    "a.zip": zipped(MEMBERS),
    "stored.ZIP": zipped(MEMBERS, zipfile.ZIP_STORED),
    "bzip2.zip": zipped(MEMBERS, zipfile.ZIP_BZIP2),
    "a.tar": tarred(MEMBERS),
    "gnu.tar": tarred(MEMBERS, tarfile.GNU_FORMAT),
    **{f"a.tar{suffix}": pack(tarred(MEMBERS)) for suffix, pack in PACKERS.items()},
    "a.tgz": gzip.compress(tarred(MEMBERS)),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_members_are_read_as_the_files_of_a_directory(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, ARCHIVES[name])
    for size in (10**6, 50):
        found, report = read(path, partition_bytes=size)
        assert (found, report.dropped) == (TEXTS, {})
        assert report.passed_over == {".txt": 2, ".jpg": 1, ".zip": 1, ".py": 1, "": 1}
        assert report.digests == [hashlib.sha256(ARCHIVES[name]).hexdigest()]
    assert texts(str(tmp_path), partition_bytes=50) == TEXTS
    assert texts(path, format="jsonl") == ["record a", "record b"]
    assert texts(path, include=["*.py", "/deep/*.json"]) == ["item", "print(1)\n"]
    assert texts(path, exclude=["deep/", "e.txt"]) == TEXTS[:1]


def test_problems_name_the_member(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zip", zipped({"in/a.jsonl": b'{"text": "a"}\nnot json\n', "b.txt": b"\xff"}))
    found, report = read(path)
    assert (found, report.dropped) == (["a"], {"bad_record": 1, "invalid_utf8": 1})
    assert examples(report)[0].startswith("a.zip/in/a.jsonl: ")
    assert examples(report)[1] == "a.zip/b.txt: not valid UTF-8 at byte 0"
    with pytest.raises(UserError, match=r"a.zip/in/a.jsonl: "):
        read(path, on_bad="fail")


def lines(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [f"{i} {rng.getrandbits(800):x}" for i in range(count)]


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def test_a_damaged_member_of_a_zip_costs_only_itself(tmp_path: Path) -> None:
    expected = [lines(1000, seed) for seed in range(3)]
    data = bytearray(zipped({f"{i}.jsonl": jsonl(part) for i, part in enumerate(expected)}))
    data[len(data) // 2 : len(data) // 2 + 100] = bytes(100)
    found, report = read(write(tmp_path / "a.zip", bytes(data)))
    assert found[:1000] == expected[0] and found[-1000:] == expected[2]
    assert 300 < len(found) - 2000 < 600
    assert report.dropped["unreadable"] == 1 and report.dropped_bytes["unreadable"] > 0
    assert any(example.startswith("a.zip/1.jsonl: cannot be read to its end: ") for example in examples(report))
    found, report = read(write(tmp_path / "b.zip", bytes(data[: len(data) // 2])))
    assert not found and report.dropped == {"unreadable": 1}
    assert report.dropped_bytes == {"unreadable": len(data) // 2}


def test_encrypted_and_unknown_members_of_a_zip_are_counted(tmp_path: Path) -> None:
    plain = zipped({"a.txt": b"one", "b.txt": b"two"}, zipfile.ZIP_STORED)
    encrypted = bytearray(plain)
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # the flags of b.txt
        encrypted[plain.rindex(signature) + offset] |= 1
    found, report = read(write(tmp_path / "a.zip", bytes(encrypted)))
    assert (found, report.dropped) == (["one"], {"unreadable": 1})
    assert examples(report)[0].startswith("a.zip/b.txt: ") and "encrypted" in examples(report)[0]
    unknown = bytearray(plain)
    for signature, offset in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):  # the method of b.txt
        unknown[plain.rindex(signature) + offset] = 99
    found, report = read(write(tmp_path / "b.zip", bytes(unknown)))
    assert (found, report.dropped) == (["one"], {"unreadable": 1})


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_damaged_tar_is_read_up_to_the_damage_and_behind_it(tmp_path: Path, suffix: str) -> None:
    pack = PACKERS.get(suffix, bytes)
    expected = [lines(1000, seed) for seed in range(3)]
    data = tarred({f"{i}.jsonl": jsonl(part) for i, part in enumerate(expected)})
    header = data.index(b"./1.jsonl")
    damaged = data[:header] + bytes(range(256)) * 2 + data[header + 512 :]
    found, report = read(write(tmp_path / f"a.tar{suffix}", pack(damaged)))
    assert found == expected[0] + expected[2] and report.dropped == {"unreadable": 1}
    assert 200_000 < report.dropped_bytes["unreadable"] < 250_000
    packed = pack(data)
    found, report = read(write(tmp_path / f"b.tar{suffix}", packed[: len(packed) // 2]))
    assert found == [*expected[0], *expected[1]][: len(found)] and 1300 < len(found) < 1600
    assert report.dropped == {"unreadable": 1}
    [place] = re.findall(r"1\.jsonl: cannot be read to its end: at byte ([\d,]+):", examples(report)[0])
    assert report.dropped_bytes == {"unreadable": len(jsonl(expected[1])) - int(place.replace(",", ""))}
    assert all("cannot be read to its end" in example for example in examples(report))


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz", "a.tgz"])
@pytest.mark.parametrize("data", [b"", b"PK", b"plain text", bytes(2000)], ids=["empty", "short", "text", "NULs"])
def test_what_is_no_archive_is_counted(tmp_path: Path, name: str, data: bytes) -> None:
    found, report = read(write(tmp_path / name, data))
    assert not found and set(report.dropped) <= {"unreadable"}
    assert len(report.digests) == 1


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz", "a.tar.zst"])
def test_no_damage_is_worth_a_traceback(tmp_path: Path, name: str) -> None:
    rng = random.Random(0)
    for trial in range(60):
        data = bytearray(ARCHIVES[name])
        for _ in range(rng.randrange(1, 20)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        found, report = read(write(tmp_path / str(trial) / name, bytes(data[: rng.randrange(len(data)) + 1])))
        assert len(found) <= 2 * len(TEXTS) and len(report.digests) == 1


def test_a_damaged_zip_archive_keeps_its_digest(tmp_path: Path) -> None:
    data = zipped(MEMBERS)[:-30]
    _, report = read(write(tmp_path / "a.zip", data))
    assert report.digests == [hashlib.sha256(data).hexdigest()]


def test_bytes_behind_a_compressed_archive_are_told(tmp_path: Path) -> None:
    found, report = read(write(tmp_path / "a.tar.gz", gzip.compress(tarred(MEMBERS)) + b"garbage"))
    assert found == TEXTS
    assert report.dropped_bytes == {"unreadable": 7}


def test_directories_in_an_archive_are_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "x=1" / "a.zip", zipped({"year=2020/a.jsonl": b'{"text": "a"}\n'}))
    assert texts(path, template="{x} {year} {text}") == ["1 2020 a"]


def test_an_invalid_byte_in_a_long_member_costs_its_line(tmp_path: Path) -> None:
    lines = [b"line %d\n" % index for index in range(1000)]
    data = b"".join([*lines[:500], b"bad \xff\n", *lines[500:]])
    found, report = read(write(tmp_path / "a.zip", zipped({"a.txt": data})), partition_bytes=2000)
    assert "".join(found) == b"".join(lines).decode()
    assert report.dropped == {"invalid_utf8": 1}


def test_what_is_no_tar_archive_is_told(tmp_path: Path) -> None:
    for name in ("a.tar", "a.tgz"):
        data = b"garbage" * 1000
        _, report = read(write(tmp_path / name, gzip.compress(data) if name == "a.tgz" else data))
        assert examples(report) == [
            f"{name}: is an archive that cannot be read to its end: no member of a tar archive is in it"
        ]
