import functools
import gzip
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import fsspec
import pytest

from gru.config import CorpusConfig
from gru.corpus import sources
from gru.corpus.documents import documents, is_heldout
from gru.corpus.report import Report
from gru.errors import UserError
from tests.gru.corpus.reading import read, spans, texts, write


def names(*given: str, **settings: Any) -> list[str]:
    return [file.name for file in sources.list_files(CorpusConfig(sources=[*given], **settings))]


def test_sources_are_files_directories_globs_and_urls(tmp_path: Path) -> None:
    for name in ["d/b.txt", "d/a/z.TXT", "d/c.jsonl.gz", "d/readme.md", "d/.git/x.txt", "d/photo.png", "e.c"]:
        write(tmp_path / name, b"x")
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
    assert texts("memory://corpus", partition_bytes=5) == ["from\n", "memory"]
    assert names("memory://corpus/**/*.txt") == ["sub/a.txt"]


def test_include_and_exclude_are_read_as_in_gitignore(tmp_path: Path) -> None:
    for name in ["main.c", "lib/a.c", "lib/a.h", "lib/tests/t.c", "tests/u.c", "lib/deep/tests/v.c", "notes", "b.txt"]:
        write(tmp_path / name, b"x")
    d = str(tmp_path)
    assert names(d, include=["*.c"]) == ["lib/a.c", "lib/deep/tests/v.c", "lib/tests/t.c", "main.c", "tests/u.c"]
    assert names(d, include=["*.c"], exclude=["tests/"]) == ["lib/a.c", "main.c"]
    assert names(d, include=["*.c"], exclude=["/tests/"]) == [
        "lib/a.c",
        "lib/deep/tests/v.c",
        "lib/tests/t.c",
        "main.c",
    ]
    assert names(d, include=["lib/**/*.c"]) == ["lib/a.c", "lib/deep/tests/v.c", "lib/tests/t.c"]
    assert names(d, include=["/*.c"]) == ["main.c"]
    assert names(d, include=["lib/", "!*.h"], exclude=["tests"]) == ["lib/a.c"]
    assert names(d, exclude=["b.*"], format="text") == [n for n in names(d, format="text") if n != "b.txt"]
    assert names(f"{d}/**/*.c", exclude=["tests/"]) == ["lib/a.c", "main.c"]
    assert names(d, include=["notes"], format="text") == ["notes"]
    with pytest.raises(UserError, match=r"notes: unknown format: set corpus\.format"):
        names(d, include=["notes"])
    with pytest.raises(UserError, match=r"nothing to read in .* after corpus\.include and corpus\.exclude"):
        names(d, include=["*.rs"])


def test_the_configured_format_holds_for_named_files_of_any_extension(tmp_path: Path) -> None:
    lines = write(tmp_path / "lines.log", b'{"text": "a"}\n{"text": "b"}\n')
    assert texts(lines, format="jsonl") == ["a", "b"]
    packed = write(tmp_path / "lines.log.gz", gzip.compress(b'{"text": "c"}\n'))
    assert texts(packed, format="jsonl") == ["c"]
    array = write(tmp_path / "array.jsonl", b'[{"text": "d"}, {"text": "e"}]')
    assert texts(array, format="json") == ["d", "e"]
    write(tmp_path / "other.txt", b"left alone")
    assert names(str(tmp_path), format="jsonl") == ["array.jsonl"]


def test_links_to_files_are_read_but_no_other_special_files(tmp_path: Path) -> None:
    write(tmp_path / "real" / "a.txt", b"one")
    d = tmp_path / "d"
    d.mkdir()
    (d / "link.txt").symlink_to(tmp_path / "real" / "a.txt")
    (d / "broken.txt").symlink_to(tmp_path / "nowhere")
    (d / "around").symlink_to(d)
    (d / "folder.txt").symlink_to(tmp_path / "real")
    os.mkfifo(d / "pipe.txt")
    for given in (str(d), f"{d}/*.txt", f"{d}/link.txt"):
        assert texts(given) == ["one"]
    (tmp_path / "to").symlink_to(d)
    assert texts(str(tmp_path / "to")) == ["one"]
    assert names(str(d), include=["*"]) == ["link.txt"]
    before = sources.list_files(CorpusConfig(sources=[str(d)]))
    write(tmp_path / "real" / "a.txt", b"two, and longer")
    assert sources.list_files(CorpusConfig(sources=[str(d)])) != before


def test_names_may_hold_spaces_globs_and_other_scripts(tmp_path: Path) -> None:
    given = ["a b.txt", "[1] x.txt", "who?.txt", "50% #2.txt", "詩 集/黃河.txt", "Dr. Who.txt", "line\nbreak.txt"]
    for name in given:
        assert texts(write(tmp_path / name, name.encode())) == [name]
    assert texts(str(tmp_path)) == sorted(given)
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")).write_bytes(b"x")
    with pytest.raises(UserError, match=r"caf�.txt: its name is not valid UTF-8"):
        names(str(tmp_path))
    assert "who?.txt" in names(str(tmp_path), exclude=["caf*"])


def test_the_standard_library_is_a_corpus() -> None:
    found = names("python-stdlib")
    assert "asyncio/base_events.py" in found and found == sorted(set(found), key=Path)
    assert not any("site-packages" in name or "/tests/" in name for name in found)
    assert sum(map(len, read("python-stdlib")[0])) > 5_000_000


# Planning


def test_small_files_share_partitions_in_order(tmp_path: Path) -> None:
    for i in range(100):
        write(tmp_path / f"{i:03}.txt", b"x" * 10)
    corpus = CorpusConfig(sources=[str(tmp_path)], partition_bytes=100)
    partitions = sources.plan(sources.list_files(corpus), corpus)
    assert [len(p) for p in partitions] == [10] * 10
    assert [s.file.name for p in partitions for s in p] == [f"{i:03}.txt" for i in range(100)]


def test_the_plan_counts_files_that_cannot_be_cut(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", b"x\n" * 500)
    write(tmp_path / "b.txt.gz", gzip.compress(b"x"))
    write(tmp_path / "c.json", b"[]")
    corpus = CorpusConfig(sources=[str(tmp_path)], partition_bytes=100)
    plan = sources.describe_plan(sources.plan(sources.list_files(corpus), corpus))
    assert plan.startswith("3 files, 0.0 MB, 11 partitions; 2 files cannot be cut (compressed, .json")


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


# Web servers and buckets


class Ranges(BaseHTTPRequestHandler):
    """Serves the files of a directory, or the bytes of them that are asked for."""

    def __init__(self, *args: Any, directory: Path) -> None:
        self.directory = directory
        super().__init__(*args)

    def log_message(self, *_: Any) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.directory / unquote(self.path.split("?")[0]).lstrip("/")
        if not path.is_file():
            return self.send_error(404)
        data = path.read_bytes()
        tag = f'"{hash(data)}"'
        start, stop = 0, len(data)
        if ranges := self.headers.get("Range"):
            first, last = ranges.removeprefix("bytes=").split("-")
            start, stop = int(first), min(int(last) + 1 if last else stop, stop)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(stop - start))
        self.send_header("ETag", tag)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[start:stop])


class Whole(SimpleHTTPRequestHandler):
    """Python's own, which knows no ranges."""

    def log_message(self, *_: Any) -> None: ...


class BreaksOff(Whole):
    """Says how long a file is, and sends half of it."""

    def copyfile(self, source: Any, outputfile: Any) -> None:
        data = source.read()
        outputfile.write(data[: len(data) // 2])


@contextmanager
def serve(handler: Any, directory: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=directory))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize("handler", [Ranges, Whole])
def test_files_of_a_web_server_read_as_those_of_a_disk(tmp_path: Path, handler: Any) -> None:
    lines = "".join(f'{{"text": "{i} 黃河"}}\n' for i in range(3000))
    write(tmp_path / "a.jsonl", lines.encode())
    write(tmp_path / "b c é.txt", b"ein Text\r\n" * 3000)
    write(tmp_path / "d.txt.gz", gzip.compress("packed 😀\n".encode() * 100))
    write(tmp_path / "e.csv", ("text,n\n" + '"a ""quoted""\nline",1\n' * 2000).encode())
    with serve(handler, tmp_path) as url:
        local = [str(tmp_path / name) for name in ("a.jsonl", "b c é.txt", "d.txt.gz", "e.csv")]
        remote = [f"{url}/{name}" for name in ("a.jsonl?download=1", "b%20c%20%C3%A9.txt", "d.txt.gz", "e.csv")]
        corpus = CorpusConfig(sources=remote, partition_bytes=10_000)
        assert len(spans(corpus)) == (
            4 if handler is Whole else len(spans(corpus.model_copy(update={"sources": local})))
        )
        for mine, yours in zip(local, remote, strict=True):
            one, other = texts(mine, partition_bytes=10_000), texts(yours, partition_bytes=10_000)
            assert "".join(one) == "".join(other) and (handler is Whole or one == other)
        with pytest.raises(UserError, match=r"no such file: .*absent.txt"):
            names(f"{url}/absent.txt")


def test_another_version_on_a_web_server_is_another_corpus(tmp_path: Path) -> None:
    for handler in (Ranges, Whole):
        path = Path(write(tmp_path / "a.txt", b"one"))
        with serve(handler, tmp_path) as url:
            corpus = CorpusConfig(sources=[f"{url}/a.txt"])
            before = sources.list_files(corpus)
            assert sources.list_files(corpus) == before
            path.write_bytes(b"two")
            os.utime(path, (1, 1))
            assert sources.list_files(corpus) != before
            assert before[0].changed(before[0].open())


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_connection_that_breaks_is_no_damaged_file(tmp_path: Path, name: str) -> None:
    lines = b"".join(b'{"text": "%d %d"}\n' % (i, i**7) for i in range(20_000))
    write(tmp_path / name, gzip.compress(lines) if name.endswith(".gz") else lines)
    with serve(BreaksOff, tmp_path) as url, pytest.raises(UserError, match=f"{name}: cannot be read") as caught:
        read(f"{url}/{name}")
    assert "\n" not in str(caught.value)
