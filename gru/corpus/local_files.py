"""The files below a local directory: all of them, or those that match a glob.

This module does not know the formats of files, or which of them are wanted.
"""

import os
import re
from collections.abc import Callable
from typing import NamedTuple

from fsspec.utils import glob_translate

Predicate = Callable[[str], bool]
OnError = Callable[[str, OSError], None]

_MAGIC = re.compile(r"[*?[]")


class Found(NamedTuple):
    """What a walk has found, as paths below its root, with / between directories."""

    files: list[str]  # regular files and links to such
    linked_directories: list[str]  # links to directories, which are not followed: they may lead in circles


class Glob(NamedTuple):
    """A pattern, as two conditions on paths below its root, the directory of all files that it can match."""

    root: str
    enters: Predicate  # whether files that match can be in this directory
    matches: Predicate  # whether the file matches


def is_glob(path: str) -> bool:
    return bool(_MAGIC.search(path))


def parse_glob(pattern: str) -> Glob:
    """Return the two parts of a glob: `**` stands for any number of directories.

    As in a shell, only a component that begins with a dot matches hidden names. Raises ValueError for an invalid one.
    """
    root = pattern[: pattern.rfind("/", 0, _MAGIC.search(pattern).start()) + 1]  # type: ignore[union-attr]
    components = pattern[len(root) :].split("/")
    whole = re.compile(glob_translate(pattern[len(root) :]))
    parts = [re.compile(glob_translate(component)) for component in components]
    dotted = [part for part, component in zip(parts, components, strict=True) if component.startswith(".")]
    any_depth = components.index("**") if "**" in components else None

    def visible(path: str) -> bool:
        return all(any(part.match(name) for part in dotted) for name in path.split("/") if name.startswith("."))

    def enters(path: str) -> bool:
        names = path.split("/")
        if any_depth is None and len(names) >= len(parts):
            return False
        return visible(path) and all(part.match(name) for part, name in zip(parts[:any_depth], names, strict=False))

    return Glob(root, enters, lambda path: bool(whole.match(path)) and visible(path))


def is_visible(path: str) -> bool:
    """Whether no component of a path below a root begins with a dot."""
    return not path.startswith(".") and "/." not in path


def walk(root: str, enters: Predicate, on_error: OnError) -> Found:
    """Return the files below a directory, without special files and broken links.

    enters: whether to read a directory. on_error: called with a directory that cannot be read, and the error.
    """
    found = Found([], [])
    prefix = f"{root.rstrip('/')}/"
    pending = [""]
    while pending:
        below = pending.pop()
        try:
            with os.scandir(prefix + below) as entries:
                for entry in entries:
                    path = below + entry.name
                    if entry.is_dir(follow_symlinks=False):
                        if enters(path):
                            pending.append(f"{path}/")
                    elif _is_file(entry):
                        found.files.append(path)
                    elif entry.is_symlink() and os.path.isdir(entry.path):  # noqa: PTH112  (False for a loop of links)
                        found.linked_directories.append(path)
        except OSError as error:
            on_error(below.rstrip("/"), error)
    return found


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a regular file or a link to one; a link whose target cannot be seen counts as one."""
    try:
        return entry.is_file()
    except PermissionError:
        return True
    except OSError:  # a loop of links
        return False
