import hashlib
import io
import json
import random
import struct
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gru.corpus.unpacking import Damage, UnpackedFile
from gru.errors import UserError
from tests.gru.corpus.reading import AWKWARD, PACKERS, examples, read, texts, write


@pytest.mark.parametrize("suffix", ["", *PACKERS])
def test_compressed_files_of_several_frames_are_read_whole(tmp_path: Path, suffix: str) -> None:
    pack = PACKERS.get(suffix, bytes)
    lines = [json.dumps({"text": f"{i} 黃"}).encode() + b"\n" for i in range(5000)]
    data = pack(b"".join(lines[:2500])) + pack(b"") + pack(b"".join(lines[2500:]))
    path = write(tmp_path / f"a.jsonl{suffix}", data)
    assert texts(path, partition_bytes=1000) == [f"{i} 黃" for i in range(5000)]
    assert texts(write(tmp_path / f"b.txt{suffix}", pack(AWKWARD.encode()))) == [AWKWARD]
    rows = io.BytesIO()
    pq.write_table(pa.table({"text": ["one", "黃"]}), rows)
    assert texts(write(tmp_path / f"c.parquet{suffix}", pack(rows.getvalue()))) == ["one", "黃"]
    found, report = read(write(tmp_path / f"d.txt{suffix}", pack(b"")))
    assert not found and report.dropped == {"empty": 1}


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("kind", ["jsonl", "csv", "txt"])
def test_the_readable_part_of_a_truncated_file_is_kept(tmp_path: Path, suffix: str, kind: str) -> None:
    rng = random.Random(0)
    expected = [f"{i} {rng.getrandbits(800):x}" for i in range(9000)]
    if kind == "jsonl":
        data = "".join(json.dumps({"text": text}) + "\n" for text in expected).encode()
    elif kind == "csv":
        data = "".join(f"{text}\n" for text in ["text", *expected]).encode()
    else:
        data = "\n\n".join(expected).encode()
    packed = PACKERS[suffix](data)
    path = write(tmp_path / f"cut.{kind}{suffix}", packed[: len(packed) * 7 // 10])
    separator = "\n\n" if kind == "txt" else None
    found, report = read(path, separator=separator)
    assert found == expected[: len(found)]
    lost = 0.7 * len(expected) - len(found)  # bzip2 has blocks of 900 kB, Zstandard of 128 kB
    assert lost < {".bz2": 4500, ".zst": 800}.get(suffix, 50)
    assert report.dropped == {"unreadable": 1}
    [example] = examples(report)
    assert example.startswith(f"cut.{kind}{suffix}: cannot be read to its end: ") and "\n" not in example
    assert report.digests == [hashlib.sha256(Path(path).read_bytes()).hexdigest()]
    with pytest.raises(UserError, match=f"cut.{kind}{suffix}: cannot be read to its end: "):
        read(path, separator=separator, on_bad="fail")
    found, report = read(write(tmp_path / f"not.{kind}{suffix}", b"plain text all along, and no magic number"))
    assert not found and report.dropped == {"unreadable": 1}


LINES = [f"document number {i}" for i in range(20_000)]
JSON_LINES = "".join(json.dumps({"text": text}) + "\n" for text in LINES).encode()


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("padding", [1, 5, 512, 100_000])
def test_nuls_behind_the_end_are_padding(tmp_path: Path, suffix: str, padding: int) -> None:
    pack = PACKERS[suffix]
    assert texts(write(tmp_path / f"a.jsonl{suffix}", pack(JSON_LINES) + bytes(padding))) == LINES
    half = JSON_LINES.index(b"\n", len(JSON_LINES) // 2) + 1
    between = pack(JSON_LINES[:half]) + bytes(padding) + pack(JSON_LINES[half:]) + bytes(padding)
    assert texts(write(tmp_path / f"b.jsonl{suffix}", between)) == LINES


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("garbage", [b"x", b"\0\0garbage\0", b"<html>" * 50_000], ids=["short", "NULs", "long"])
def test_garbage_behind_the_end_is_counted_in_bytes_and_costs_no_document(
    tmp_path: Path, suffix: str, garbage: bytes
) -> None:
    name, size = f"a.jsonl{suffix}", len(garbage.lstrip(b"\0"))
    found, report = read(write(tmp_path / name, PACKERS[suffix](JSON_LINES) + garbage))
    assert found == LINES
    assert (report.dropped["unreadable"], report.dropped_bytes["unreadable"]) == (0, size)
    assert examples(report) == [f"{name}: has {size:,} bytes behind the end of the compressed data"]
    with pytest.raises(UserError, match=f"{name}: has {size:,} bytes behind the end"):
        read(str(tmp_path / name), on_bad="fail")


def test_zstandard_frames_may_have_long_windows_and_may_be_skipped(tmp_path: Path) -> None:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd

    options = {zstd.CompressionParameter.window_log: 31, zstd.CompressionParameter.content_size_flag: 0}
    compressor = zstd.ZstdCompressor(options=options)
    packed = compressor.compress(JSON_LINES, zstd.ZstdCompressor.FLUSH_BLOCK) + compressor.flush()
    assert zstd.get_frame_info(packed).decompressed_size is None
    assert texts(write(tmp_path / "a.jsonl.zst", packed)) == LINES
    skipped = struct.pack("<II", 0x184D2A50, 5) + b"index"
    assert texts(write(tmp_path / "b.jsonl.zst", skipped + packed + skipped)) == LINES


@pytest.mark.parametrize("suffix", PACKERS)
def test_what_a_damaged_file_loses_is_told_in_bytes(tmp_path: Path, suffix: str) -> None:
    rng = random.Random(1)
    expected = [f"{i} {rng.getrandbits(1600):x}" for i in range(8000)]
    packed = bytearray(PACKERS[suffix]("".join(json.dumps({"text": text}) + "\n" for text in expected).encode()))
    place = len(packed) // 2
    packed[place : place + 2000] = bytes(2000)
    found, report = read(write(tmp_path / f"a.jsonl{suffix}", bytes(packed)))
    assert found[:1500] == expected[:1500] and report.dropped["unreadable"] == 1
    assert 0 < report.dropped_bytes["unreadable"] <= len(packed) - place + 1_000_000  # bzip2 has large blocks
    found, report = read(write(tmp_path / f"b.txt{suffix}", bytes(packed)))
    assert found and report.dropped["unreadable"] == 1


@pytest.mark.parametrize("suffix", PACKERS)
def test_the_text_before_the_damage_is_kept_without_a_separator(tmp_path: Path, suffix: str) -> None:
    rng = random.Random(0)
    text = "".join(f"{i} {rng.getrandbits(800):x}\n" for i in range(9000))
    packed = PACKERS[suffix](text.encode())
    for size in (100_000, 10**8):
        found, report = read(write(tmp_path / f"a.txt{suffix}", packed[: len(packed) * 9 // 10]), partition_bytes=size)
        assert text.startswith("".join(found)) and report.dropped == {"unreadable": 1}
        assert len("".join(found)) > len(text) * (0.4 if suffix == ".bz2" else 0.8)


@pytest.mark.parametrize("suffix", PACKERS)
def test_any_damage_ends_in_text_or_in_damage(suffix: str) -> None:
    rng = random.Random(0)
    packed = PACKERS[suffix](JSON_LINES[:30_000])
    for _ in range(100):
        data = bytearray(packed * rng.randrange(1, 4))
        for _ in range(rng.randrange(1, 9)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        file = io.BufferedReader(UnpackedFile(io.BytesIO(data[: rng.randrange(len(data)) + 1]), suffix))
        try:
            assert len(file.read()) < 10**7
        except Damage as error:
            assert str(error) and 0 <= error.position <= len(data)
