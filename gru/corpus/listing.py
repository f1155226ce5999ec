"""The listing of the sources: finds the input files.

This module does not know what the files contain, or how they are divided.
"""

import os
import re
import stat
import sysconfig
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any, NamedTuple, get_args
from urllib.parse import unquote

import fsspec
import pathspec

from gru.config import CorpusConfig
from gru.config_corpus import BUILT_IN_SOURCES, Format, SourceOptions
from gru.corpus import local_files
from gru.corpus.encodings import check_encoding
from gru.corpus.file_formats import EXTENSIONS, Kind, extension, file_format
from gru.errors import GaveUp, UserError, first_line

LINKED_DIRECTORY = "link to a directory"

_VERSION_KEYS = ("mtime", "ETag", "etag", "LastModified", "Last-Modified", "last_modified", "created")
_EMPTY_PARTITION = "__HIVE_DEFAULT_PARTITION__"
# The directories that this program writes in its storage.
_STORAGE_NAMES = ("datasets", "runs", "comparisons", "embedded", "mlflow", "logs")
_STDLIB_SKIPPED = {
    *("site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "idle_test", "lib2to3"),
    *("encodings", "pydoc_data", "turtledemo", "ensurepip", "lib-dynload"),
}  # fmt: skip


@dataclass(frozen=True)
class SourceFile:
    """An input file."""

    path: str  # absolute path, or a URL
    size: int  # in bytes
    modified: str  # version of the file: its modification time or ETag
    kind: Kind
    compression: str  # ".gz", ".zst", ".bz2", ".xz" or ""
    name: str  # its name in the dataset: its path below the source that it belongs to
    options: SourceOptions  # of the source that it belongs to
    seekable: bool = True  # False: the server sends it from the beginning only
    columns: tuple[tuple[str, str], ...] = ()  # (name, value) of the hive-style directories of its path

    @property
    def divisible(self) -> bool:
        """Whether the file may be cut into spans."""
        return self.kind not in ("json", "html", "archive") and not self.compression and self.seekable

    def open(self) -> IO[bytes]:
        """Open the file for reading bytes. Raises OSError; opening and reading a URL of the web raise as `web` does."""
        if "://" not in self.path:
            return open(self.path, "rb")  # noqa: PTH123  (making a Path takes longer than opening)
        if _is_web(self.path):
            from gru.corpus import web

            return web.open_file(self.path, self.size, self.seekable, self.compression)
        return fsspec.open(self.path, "rb").open()

    def changed(self, file: IO[bytes]) -> bool:
        """Whether the open file is no longer the one that was listed."""
        if "://" not in self.path:
            status = os.fstat(file.fileno())
            return (status.st_size, str(status.st_mtime)) != (self.size, self.modified)
        if _is_web(self.path):
            from gru.corpus import web

            return web.probe(self.path, self.compression)[:2] != (self.size, self.modified)
        filesystem, path = fsspec.core.url_to_fs(self.path)
        filesystem.invalidate_cache()
        info = filesystem.info(path)
        return (info["size"], _version(info)) != (self.size, self.modified)


class Listing(NamedTuple):
    """The input files, and what was found beside them."""

    files: list[SourceFile]  # in the order of the sources and sorted within each, without repetitions
    passed_over: dict[str, int]
    """Number of files of directories and globs that are not read, by extension; hidden ones do not count. Under
    `LINKED_DIRECTORY`, number of links to directories, which are not followed."""


class _Matches(NamedTuple):
    """The files that a path, directory or glob stands for."""

    root: str  # the directory that their names start from, with a / at its end
    names: list[str]  # their paths below the root
    is_directory: bool  # whether the user named the directory, so that `include` chooses from its files
    linked_directories: list[str]  # links to directories, which are not followed
    infos: dict[str, dict[str, Any]]  # what a remote file system says about each name


class _Patterns:
    """The patterns of `include` and `exclude` of a source. Raises UserError for an invalid one."""

    def __init__(self, options: SourceOptions) -> None:
        self.options = options
        self.include, self.exclude = (
            self._parse(key, patterns) for key, patterns in (("include", options.include), ("exclude", options.exclude))
        )

    def _parse(self, key: str, patterns: tuple[str, ...]) -> Callable[[str], bool]:
        try:
            return pathspec.GitIgnoreSpec.from_lines(patterns).match_file
        except ValueError as error:
            raise UserError(f"{self.options.key_of(key)} = {[*patterns]}: {error}") from None


def list_files(corpus: CorpusConfig, storage: str | None = None) -> Listing:
    """Return the files of all sources; a file that several of them match belongs to the last one.

    storage: directory of the pipeline's own files, which are left out where they are below a source. Raises UserError
    if a source is absent, cannot be read, or has nothing to read; GaveUp if a web server fails.
    """
    found: dict[str, SourceFile] = {}
    own_directories = _own_directories(corpus, storage)
    passed_over: dict[str, str] = {}  # extension by key of the file
    for options in corpus.source_options():
        check_encoding(options)
        own: dict[str, SourceFile] = {}
        for source in options.paths:
            files, others = _list_source(source, options, own_directories)
            own |= {key: file for key, file in files.items() if key not in own}
            passed_over |= others
        for key in own:  # removed first, so that the files are in the order of the sources that they belong to
            found.pop(key, None)
        found |= own
    used = {file.options.index for file in found.values()}
    for options in corpus.source_options():
        if options.index not in used:
            raise UserError(
                f"{_path_key(options)}: each of its files belongs to a later source, which matches it too: write this "
                "source behind that one, or exclude its files there"
            )
    extensions = Counter(extension for key, extension in passed_over.items() if key not in found)
    return Listing([*found.values()], dict(sorted(extensions.items())))


def _path_key(options: SourceOptions) -> str:
    """Return the key that holds the paths of a source."""
    return options.key if options.key == "corpus.sources" else options.key_of("path")


def _list_source(source: str, options: SourceOptions, own: set[str]) -> tuple[dict[str, SourceFile], dict[str, str]]:
    """Return the files of one path, directory, glob or URL, and the extensions of those that are not read.

    Both by a key that is the same for every spelling of a path. own: directories that are left out below the source.
    """
    patterns = _Patterns(options)
    try:
        if source in BUILT_IN_SOURCES:
            return {file.path: file for file in _standard_library(options)}, {}
        if _is_web(source):
            file = _web_file(source, options)
            return {file.path: file}, {}
        if "://" in source.removeprefix("file://"):
            filesystem, path = fsspec.core.url_to_fs(source, use_listings_cache=False)
            return _choose(_match_remote(filesystem, path, own), options, patterns, source, filesystem)
        return _choose(_match_local(source.removeprefix("file://"), patterns, own), options, patterns, source)
    except (UserError, GaveUp) as error:
        raise type(error)(f"{_path_key(options)}: {error}") from None
    except FileNotFoundError:
        raise UserError(f"{_path_key(options)}: no such file: {source}") from None
    except OSError as error:
        raise UserError(
            f"{_path_key(options)}: cannot read {error.filename or source}: {error.strerror or first_line(error)}"
        ) from None
    except Exception as error:  # each file system has its own types of errors
        raise UserError(f"{_path_key(options)}: cannot read {source}: {first_line(error)}") from None


# What a path, directory or glob stands for


def _match_local(source: str, patterns: _Patterns, own: set[str]) -> _Matches:
    """Return the files of a path on this machine; a path that exists is no glob. Raises OSError and UserError."""
    path = str(Path(source).expanduser().absolute()) if source else ""
    glob = None
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116  (follows links)
    except (FileNotFoundError, NotADirectoryError):
        glob = local_files.parse_glob(path) if local_files.is_glob(path) else None
        if glob is None or not os.path.isdir(glob.root):  # noqa: PTH112
            raise FileNotFoundError from None
    if glob is None and not stat.S_ISDIR(mode):
        if not stat.S_ISREG(mode):
            raise UserError(f"{source}: is neither a file nor a directory: write what it sends to a file first")
        root, name = os.path.split(path)
        return _Matches(f"{root.rstrip('/')}/", [name], False, [], {})
    root = glob.root if glob else f"{path.rstrip('/')}/"
    real_root = _real(root)

    def enters(directory: str) -> bool:
        wanted = glob.enters(directory) if glob else local_files.is_visible(directory)
        return wanted and f"{real_root}{directory}" not in own

    def on_error(directory: str, error: OSError) -> None:
        if directory and patterns.exclude(f"{directory}/file"):
            return
        exclude = patterns.options.key_of("exclude")
        remedy = f"; give this user permission, or add it to {exclude}" if directory else ""
        raise UserError(f"cannot read {root}{directory}: {error.strerror}{remedy}")

    files, linked = local_files.walk(root, enters, on_error)
    matches = glob.matches if glob else local_files.is_visible
    files = [name for name in files if matches(name)]
    if glob and not files:
        raise FileNotFoundError
    return _Matches(root, files, glob is None, [name for name in linked if matches(name)], {})


def _match_remote(filesystem: Any, path: str, own: set[str]) -> _Matches:
    """Return the files of a URL that fsspec opens, such as s3://. Raises the file system's errors."""
    try:
        info = filesystem.info(path)
    except FileNotFoundError:
        info = {"type": "glob"}
    if info["type"] == "file":
        root, name = path.rpartition("/")[::2]
        return _Matches(f"{root}/", [name], False, [], {name: info})
    if info["type"] == "directory":
        root, glob = f"{path.rstrip('/')}/", None
        entries = filesystem.find(path, detail=True)
    elif local_files.is_glob(path):
        glob = local_files.parse_glob(path)
        root = glob.root
        entries = filesystem.glob(path, detail=True)
    else:
        raise FileNotFoundError
    infos = {name.removeprefix(root): info for name, info in entries.items() if info["type"] == "file"}
    below = tuple(f"{directory.removeprefix(root)}/" for directory in own if directory.startswith(root))
    matches = glob.matches if glob else local_files.is_visible
    infos = {name: info for name, info in infos.items() if matches(name) and not name.startswith(below)}
    if glob and not infos:
        raise FileNotFoundError
    return _Matches(root, [*infos], glob is None, [], infos)


def _own_directories(corpus: CorpusConfig, storage: str | None) -> set[str]:
    """Return the directories that this program writes to, as absolute paths or as paths in a remote file system.

    They are the directory of dropped documents, the storage, and what is in the storage if that is a source itself.
    """
    below = [storage, *(f"{storage.rstrip('/')}/{name}" for name in _STORAGE_NAMES)] if storage else []
    return {
        fsspec.core.url_to_fs(path)[1].rstrip("/") if "://" in path else os.path.realpath(path)
        for path in [*below, corpus.dropped]
        if path
    }


def _real(root: str) -> str:
    return f"{os.path.realpath(root).rstrip('/')}/"


# Which of the files are read


def _choose(
    matches: _Matches, options: SourceOptions, patterns: _Patterns, source: str, filesystem: Any = None
) -> tuple[dict[str, SourceFile], dict[str, str]]:
    """Return the files to read, and the extensions of the others. Raises UserError if there is none to read."""
    files: dict[str, SourceFile] = {}
    real_root = _real(matches.root) if filesystem is None else matches.root
    passed_over = {f"{real_root}{name}": LINKED_DIRECTORY for name in matches.linked_directories}
    selects = bool(options.include) and matches.is_directory
    explicit = selects or not matches.is_directory
    unknown = ""
    for name in sorted(matches.names):
        key = f"{real_root}{name}"
        if (selects and not patterns.include(name)) or (options.exclude and patterns.exclude(name)):
            passed_over[key] = _shown(extension(name))
            continue
        kind, compression = file_format(name, options.format, explicit)
        if kind is None:
            passed_over[key], unknown = _shown(extension(name)), unknown or name
            continue
        path, size, version = _stat(f"{matches.root}{name}", filesystem, matches.infos.get(name, {}), options)
        files[key] = SourceFile(path, size, version, kind, compression, name, options, True, hive_columns(path))
    if files:
        return files, passed_over
    if unknown and explicit:
        raise _unknown_format(matches.root + unknown, options)
    include, exclude = options.key_of("include"), options.key_of("exclude")
    filtered = f" after {include} and {exclude}" if options.include or options.exclude else ""
    raise UserError(
        f"nothing to read in {source}{filtered}: a directory's files are found by the extensions {EXTENSIONS}; name "
        f"others, match them by a glob, or add them to {include}"
    )


def _unknown_format(path: str, options: SourceOptions) -> UserError:
    formats = ", ".join(get_args(Format)[1:])
    return UserError(f"{_shown(path)}: unknown format: set {options.key_of('format')} to one of {formats}")


def _shown(name: str) -> str:
    """Return a name with U+FFFD in place of what is not UTF-8."""
    return os.fsencode(name).decode(errors="replace")


def _stat(path: str, filesystem: Any, info: dict[str, Any], options: SourceOptions) -> tuple[str, int, str]:
    """Return (path or URL, size, version) of a file. Raises OSError and UserError."""
    if path != _shown(path):
        raise UserError(
            f"{_shown(path)}: its name is not valid UTF-8: rename it, or name it in {options.key_of('exclude')}"
        )
    if filesystem is None:
        status = os.stat(path)  # noqa: PTH116  (as above; follows links)
        return path, status.st_size, str(status.st_mtime)
    if info.get("size") is None:
        raise UserError(f"{path}: the server does not tell its size; copy it to a disk or bucket first")
    return filesystem.unstrip_protocol(path), info["size"], _version(info)


def _version(info: dict[str, Any]) -> str:
    """Return what changes when a remote file changes: its modification time or ETag; empty if there is neither."""
    version = next((info[key] for key in _VERSION_KEYS if info.get(key)), "")
    return str(version.timestamp() if isinstance(version, datetime) else version)


def hive_columns(path: str) -> tuple[tuple[str, str], ...]:
    """Return (name, value) of each directory NAME=VALUE of a path, as Hive and Spark write partitions of a table."""
    directories = path.split("/")[:-1] if "=" in path else []
    pairs = [part.partition("=") for part in directories if re.fullmatch("[^=]+=.*", part, re.DOTALL)]
    return tuple((unquote(name), "" if value == _EMPTY_PARTITION else unquote(value)) for name, _, value in pairs)


def _is_web(path: str) -> bool:
    return path.startswith(("http://", "https://"))


def _web_file(url: str, options: SourceOptions) -> SourceFile:
    """Return the file of a web server: there are no directories and globs, and a query may look like one."""
    from gru.corpus import web

    name = web.file_name(url)
    kind, compression = file_format(name, options.format, True)
    if kind is None:
        raise _unknown_format(url, options)
    size, version, seekable = web.probe(url, compression)
    columns = hive_columns(url.partition("?")[0])
    return SourceFile(url, size, version, kind, compression, name, options, seekable, columns)


def _standard_library(options: SourceOptions) -> list[SourceFile]:
    """Return the Python files of the running interpreter's standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    paths: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = set(folders) - _STDLIB_SKIPPED
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    if not paths:
        raise UserError(f"python-stdlib: this interpreter has no Python source code in {root}")
    stats = [(path, path.relative_to(root).as_posix(), path.stat()) for path in sorted(paths)]
    return [SourceFile(str(p), s.st_size, str(s.st_mtime), "text", "", name, options) for p, name, s in stats]
