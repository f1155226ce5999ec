import gzip
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import fsspec
import pytest

from gru.config import CorpusConfig, TokenizerConfig
from gru.corpus.listing import SourceFile, list_files
from gru.corpus.prepare import dataset_key, recorded_sources, storage_of
from gru.errors import UserError
from tests.gru.corpus.reading import read, texts, write


def names(*given: str, **settings: Any) -> list[str]:
    return [file.name for file in list_files(CorpusConfig(sources=[*given], **settings)).files]


def test_sources_are_files_directories_globs_and_urls(tmp_path: Path) -> None:
    for name in ["d/b.txt", "d/a/z.TXT", "d/c.jsonl.gz", "d/readme.md", "d/.git/x.txt", "d/photo.png", "e.c"]:
        write(tmp_path / name, b"x")
    d = str(tmp_path / "d")
    assert names(d) == ["a/z.TXT", "b.txt", "c.jsonl.gz", "readme.md"]
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
    before = list_files(CorpusConfig(sources=[str(d)]))
    write(tmp_path / "real" / "a.txt", b"two, and longer")
    assert list_files(CorpusConfig(sources=[str(d)])) != before


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


def passed_over(*given: str, **settings: Any) -> dict[str, int]:
    return list_files(CorpusConfig(sources=[*given], **settings)).passed_over


def tables(*given: dict[str, Any], **settings: Any) -> list[SourceFile]:
    return list_files(CorpusConfig.model_validate({"source": [*given], **settings})).files


# What is not read


def test_files_that_are_not_read_are_counted_by_extension(tmp_path: Path) -> None:
    for name in ["a.txt", "b.JPG", "c.jpg", "LICENSE", "x.log.gz", "part.0001", "d/e.py", "d/f.bak", f"g.{'x' * 40}"]:
        write(tmp_path / name, b"x")
    for name in [".DS_Store", "._a.jsonl", ".git/objects/x.txt", "d/.cache/y.txt"]:
        write(tmp_path / name, b"x")
    d = str(tmp_path)
    counts = {"": 3, ".bak": 1, ".jpg": 2, ".log.gz": 1, ".py": 1}
    assert names(d) == ["a.txt"] and passed_over(d) == counts
    assert passed_over(d, include=["*.py"]) == {"": 3, ".bak": 1, ".jpg": 2, ".log.gz": 1, ".txt": 1}
    assert passed_over(f"{d}/*", exclude=["*.log.gz"]) == {"": 3, ".jpg": 2, ".log.gz": 1}
    assert names(f"{d}/*") == ["a.txt"]
    assert passed_over(d, f"{d}/**/*.py", d) == {"": 3, ".bak": 1, ".jpg": 2, ".log.gz": 1}
    with pytest.raises(UserError, match=r"b.JPG: unknown format: set corpus\.format to one of text, .*parquet, html$"):
        names(f"{d}/b.JPG")
    with pytest.raises(UserError, match=r"c.jpg: unknown format: set corpus\.format"):
        names(f"{d}/*.jpg")


def test_globs_leave_out_hidden_files_unless_they_name_the_dot(tmp_path: Path) -> None:
    for name in ["a.txt", ".b.txt", ".git/c.txt", "d/e.txt", "d/.f/g.txt"]:
        write(tmp_path / name, b"x")
    d = str(tmp_path)
    assert names(f"{d}/*") == names(f"{d}/*.txt") == ["a.txt"]
    assert names(f"{d}/**/*.txt") == ["a.txt", "d/e.txt"]
    assert names(f"{d}/.*.txt") == [".b.txt"]
    assert names(f"{d}/.git/*") == ["c.txt"]
    assert names(f"{d}/*/.f/*") == ["d/.f/g.txt"]
    assert names(f"{d}/.b.txt") == [".b.txt"]
    with pytest.raises(UserError, match="no such file"):
        names(f"{d}/*.md")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.txt", ["a.txt"]),
        ("*/*.txt", ["x/b.txt"]),
        ("**/*.txt", ["a.txt", "x/b.txt", "x/y/c.txt"]),
        ("x/**", ["b.txt", "y/c.txt"]),
        ("**/y/*", ["x/y/c.txt"]),
        ("x/**/c.txt", ["y/c.txt"]),
        ("[!b].txt", ["a.txt"]),
        ("?/?.txt", ["x/b.txt"]),
        ("*/y/c.t*", ["x/y/c.txt"]),
    ],
)
def test_globs_match_as_in_a_shell(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    for name in ["a.txt", "x/b.txt", "x/y/c.txt"]:
        write(tmp_path / name, b"x")
        fsspec.filesystem("memory").pipe(f"{tmp_path}/{name}", b"x")
    assert names(f"{tmp_path}/{pattern}") == expected
    assert names(f"memory://{tmp_path}/{pattern}") == expected


def test_a_path_that_exists_is_no_glob(tmp_path: Path) -> None:
    path = write(tmp_path / "d[v1]" / "a.txt", b"one")
    write(tmp_path / "dv" / "a.txt", b"other")
    assert texts(path) == texts(str(tmp_path / "d[v1]")) == ["one"]
    assert texts(f"{tmp_path}/d[[]v1]/*") == ["one"]


def test_the_format_depends_on_the_name_of_the_file_only(tmp_path: Path) -> None:
    for name, kind, compression in [
        ("x.tsv/a.csv", "csv", ""),
        ("x.gz/a.json", "json", ""),
        ("a.HTML", "html", ""),
        ("a.htm.gz", "html", ".gz"),
        ("a.md", "text", ""),
        ("a.zip", "archive", ""),
        ("a.tar", "archive", ""),
        ("a.tgz", "archive", ".gz"),
        ("a.tar.zst", "archive", ".zst"),
        ("a.parquet", "parquet", ""),
    ]:
        write(tmp_path / name, b"x")
        [file] = list_files(CorpusConfig(sources=[str(tmp_path / name)])).files
        assert (file.kind, file.compression) == (kind, compression)
        assert name in names(str(tmp_path))
        assert file.divisible == (kind in ("text", "csv", "parquet"))
    [file] = list_files(CorpusConfig(sources=[f"{tmp_path}/a.zip"], format="text")).files
    assert file.kind == "archive"


def test_hive_style_directories_are_columns(tmp_path: Path) -> None:
    for name in ["year=2024/lang=en/a.txt", "year=__HIVE_DEFAULT_PARTITION__/lang=z%2Fh%20%E9/b.txt", "plain/c=.txt"]:
        write(tmp_path / name, b"x")
    columns = {file.name: file.columns for file in list_files(CorpusConfig(sources=[str(tmp_path)])).files}
    assert columns == {
        "plain/c=.txt": (),
        "year=2024/lang=en/a.txt": (("year", "2024"), ("lang", "en")),
        "year=__HIVE_DEFAULT_PARTITION__/lang=z%2Fh%20%E9/b.txt": (("year", ""), ("lang", "z/h \ufffd")),
    }
    [file] = list_files(CorpusConfig(sources=[f"{tmp_path}/year=2*/*/*.txt"])).files
    assert file.columns == (("year", "2024"), ("lang", "en"))


# Directories that are left out, or cannot be read


def test_the_storage_and_the_dropped_documents_are_left_out_of_a_source(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", b"{}")
    write(tmp_path / "store/datasets/0123456789abcdef/train-00000.parquet", b"x")
    write(tmp_path / "store/mlflow/model.json", b"x")
    write(tmp_path / "dropped/x.jsonl", b"x")
    (tmp_path / "link").symlink_to(tmp_path / "store")
    corpus = CorpusConfig(sources=[str(tmp_path)], dropped=f"{tmp_path}/dropped")

    def listed(corpus: CorpusConfig, store: str) -> list[str]:
        return [file.name for file in list_files(corpus, store).files]

    assert listed(corpus, f"{tmp_path}/store") == listed(corpus, f"{tmp_path}/link") == ["a.jsonl"]
    assert "store/mlflow/model.json" in listed(corpus, f"{tmp_path}/elsewhere")
    assert list_files(corpus, f"{tmp_path}/store").passed_over == {"link to a directory": 1}
    inside = CorpusConfig(sources=[f"{tmp_path}/**/*.json*", f"{tmp_path}/store/datasets/*/*.parquet"])
    assert listed(inside, f"{tmp_path}/store") == [
        "a.jsonl",
        "dropped/x.jsonl",
        "0123456789abcdef/train-00000.parquet",
    ]
    (tmp_path / "datasets").symlink_to("elsewhere")
    write(tmp_path / "runs/x/result.json", b"x")
    assert listed(corpus, str(tmp_path)) == [
        "a.jsonl",
        "store/datasets/0123456789abcdef/train-00000.parquet",
        "store/mlflow/model.json",
    ]
    memory = fsspec.filesystem("memory")
    for name in ("a.txt", "store/runs/b.txt", "storeroom/c.txt"):
        memory.pipe(f"/left-out/{name}", b"x")
    assert listed(CorpusConfig(sources=["memory://left-out"]), "memory://left-out/store") == [
        "a.txt",
        "storeroom/c.txt",
    ]


_AS_NOBODY = """
import os, sys
from gru.config import CorpusConfig
from gru.corpus.listing import list_files
from gru.errors import UserError

def show(source, exclude):
    try:
        print([file.name for file in list_files(CorpusConfig(sources=[sys.argv[1] + source], exclude=exclude)).files])
    except UserError as error:
        print(error)

show("/open", ["x"])  # imports what is needed, perhaps from where only root may read
if os.getuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
for source in ("", "/*/*.txt", "/**/*.txt", "/o*/*.txt", "/closed", "/closed/b.txt"):
    show(source, [])
show("", ["closed/"])
"""


def test_a_directory_without_permission_is_an_error(tmp_path: Path) -> None:
    root = Path(tempfile.mkdtemp(prefix="gru-permissions-"))  # pytest's own directories are closed to other users
    try:
        write(root / "open/a.txt", b"x")
        write(root / "closed/b.txt", b"x")
        write(root / ".hidden/c.txt", b"x")
        for name, mode in [(".", 0o755), ("closed", 0), (".hidden", 0)]:
            (root / name).chmod(mode)
        command = [sys.executable, "-c", _AS_NOBODY, str(root)]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    finally:
        for name in ("closed", ".hidden"):
            (root / name).chmod(0o755)
        shutil.rmtree(root)
    error = f"corpus.sources: cannot read {root}/closed: Permission denied"
    assert all(re.match(f"{error}; .*corpus.exclude", line) for line in lines[1:4])
    assert lines[4:] == [
        "['open/a.txt']",
        error.replace("closed", "closed/"),
        f"corpus.sources: cannot read {root}/closed/b.txt: Permission denied",
        "['open/a.txt']",
    ]


def test_special_files_and_loops_of_links_never_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "self.txt").symlink_to("self.txt")
    (tmp_path / "loop").symlink_to(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "socket.txt"))
        for name in ("pipe.txt", "socket.txt"):
            with pytest.raises(UserError, match=f"{name}: is neither a file nor a directory"):
                names(str(tmp_path / name))
        write(tmp_path / "a.txt", b"x")
        assert names(str(tmp_path)) == names(f"{tmp_path}/*.txt") == ["a.txt"]
        assert passed_over(str(tmp_path)) == {"link to a directory": 1}
    for given in ("self.txt", "x" * 300, "nul\0", "a.txt/b"):
        with pytest.raises(UserError, match=r"corpus\.sources: (cannot read|no such file)"):
            names(f"{tmp_path}/{given}")
    with pytest.raises(UserError, match=r"corpus\.sources: no such file"):
        names("")


def test_names_that_are_not_utf8_can_be_counted(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", b"x")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/x.caf\xe9")).write_bytes(b"x")
    assert passed_over(str(tmp_path)) == {".caf\ufffd": 1}


def test_a_storage_inside_a_source_does_not_change_the_key(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", b"x")
    corpus, tokenizer, store = CorpusConfig(sources=[str(tmp_path)]), TokenizerConfig(kind="byte"), f"{tmp_path}/store"
    key = dataset_key(corpus, tokenizer, store=store)
    directory = f"{store}/datasets/{key}"
    write(Path(directory, "train-00000.parquet"), b"x")
    assert storage_of(directory) == storage_of(f"{directory}/") == store
    assert dataset_key(corpus, tokenizer, store=store) == key != dataset_key(corpus, tokenizer)
    assert [source.name for source in recorded_sources(corpus, directory)] == ["a.txt"]
    assert storage_of("s3://bucket/store/datasets/x") == "s3://bucket/store"
    assert storage_of("/tmp/x") == "/tmp/x"


# Sources with options of their own


def test_a_file_belongs_to_the_last_source_that_matches_it(tmp_path: Path) -> None:
    for name in ["a.txt", "b.txt", "c.txt"]:
        write(tmp_path / name, b"x")
    d = str(tmp_path)
    files = tables({"path": d}, {"path": [f"{d}/b.txt", f"{d}/../{tmp_path.name}/*.txt"], "exclude": ["c.txt"]})
    assert [(file.name, file.options.index) for file in files] == [("c.txt", 0), ("b.txt", 1), ("a.txt", 1)]
    (tmp_path / "link").symlink_to(d)
    assert [file.options.index for file in tables({"path": [d, d]}, {"path": f"{d}/link/a.txt"})] == [0, 0, 1]


def test_mistakes_name_the_table_and_its_key(tmp_path: Path) -> None:
    for name in ["a.txt", "b.jpg"]:
        write(tmp_path / name, b"x")
    d = str(tmp_path)
    for given, message in [
        ([{"path": f"{d}/absent"}], r"^corpus\.source\.0\.path: no such file"),
        ([{"path": d}, {"path": d, "include": ["*.c"]}], r"^corpus\.source\.1\.path: nothing .*source\.1\.include"),
        ([{"path": f"{d}/b.jpg"}], r"^corpus\.source\.0\.path: .*b.jpg: .*set corpus\.source\.0\.format"),
        ([{"path": f"{d}/a.txt"}, {"path": d}], r"^corpus\.source\.0\.path: each of its files belongs to a later"),
        ([{"path": f"{d}/a**.txt"}], r"^corpus\.source\.0\.path: cannot read .*\*\*"),
    ]:
        with pytest.raises(UserError, match=message):
            tables(*given)
    with pytest.raises(UserError, match=r"^corpus\.sources: each of its files belongs to a later source"):
        tables({"path": d}, sources=[f"{d}/a.txt"])
