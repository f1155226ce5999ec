"""What of a storage, of this user's cache and of its embedded Rays nothing needs any more, and its removal.

In doubt a thing stays: what changed of late, what has no known age, and what this program did not make. The files that
mark a dataset, a run or a checkpoint as complete are removed first: one that is removed in part is an unfinished one.
"""

import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from gru import storage
from gru.corpus.dataset import MANIFEST
from gru.corpus.shards import WORK_DIRECTORY
from gru.digests import DIGESTS
from gru.storage import StoredFile
from gru.terminal import counted
from gru.training import checkpoint as checkpoints
from gru.training.initial_model import INITIAL
from pipelines import ray_sessions
from pipelines.needs import LINEAGE, Needs

DAY = 24 * 3600
LOG_DAYS = CODE_DAYS = 30  # without a change, or a use
DRAFT_DAYS = 1 / 24  # a process may still write a temporary file
SERVED_DAYS = 180  # an endpoint may be up for long without another champion

_RESULT = "result.json"
_KEY = re.compile("[0-9a-f]{16}")
_LOG = re.compile(r"[a-z]+-[0-9a-f]{16}\.log")
_UNNEEDED = "no registered version and no newest run needs it"
_UNFINISHED = "unfinished, and no workflow is recorded that resumes it"
_KILLED = "left by a process that was killed"


@dataclass(frozen=True)
class Item:
    """A directory with its files."""

    path: str
    files: list[StoredFile]

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[1]

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def changed(self) -> float | None:
        """When a file was modified last; None if that is not known of each."""
        times = [file.modified for file in self.files]
        known = [time for time in times if time is not None]
        return max(known) if known and len(known) == len(times) else None

    @property
    def names(self) -> set[str]:
        return {file.name for file in self.files}

    def below(self, directory: str) -> "Item":
        """The item of a directory below this one."""
        start = f"{directory}/"
        inside = [file for file in self.files if file.name.startswith(start)]
        return Item(
            storage.join(self.path, directory), [file._replace(name=file.name[len(start) :]) for file in inside]
        )

    def read(self, name: str) -> dict[str, Any]:
        """Return the JSON object in a file of this item; {} if there is none."""
        if name in self.names:
            try:
                value = storage.read_json(storage.join(self.path, name))
            except (OSError, ValueError):  # damaged, or removed meanwhile
                return {}
            return value if isinstance(value, dict) else {}
        return {}

    def removal(self) -> tuple[str, ...]:
        """Return the paths in the order of removal: what marks the item or a part of it as complete comes first."""
        first = [_RESULT, MANIFEST, DIGESTS]
        records = [name for name in self.names if name.endswith(".json")]
        ordered = sorted(records, key=lambda name: (first.index(name) if name in first else len(first), name))
        return (*(storage.join(self.path, name) for name in ordered), self.path)


@dataclass(frozen=True)
class Row:
    """Something that nothing needs."""

    name: str
    paths: tuple[str, ...]
    """Files and directories, in the order in which they are removed."""
    size: int
    """Bytes."""
    changed: float
    """When one of its files was modified last: Unix time."""
    reason: str


@dataclass
class Findings:
    """What can be removed, and what stays."""

    rows: list[Row] = field(default_factory=list)
    kept: Counter[str] = field(default_factory=Counter)
    """Bytes of what stays, by what needs it."""

    @property
    def size(self) -> int:
        """Bytes that can be removed."""
        return sum(row.size for row in self.rows)

    def add(self, name: str, items: list[Item], reason: str) -> None:
        """Add a row for items that are removed."""
        paths = tuple(path for item in items for path in item.removal())
        changed = max(item.changed or 0 for item in items)
        self.rows.append(Row(name, paths, sum(item.size for item in items), changed, reason))

    def add_files(self, name: str, directory: str, files: Iterable[StoredFile], reason: str) -> None:
        """Add a row for files in a directory that stays, if there are any."""
        if chosen := list(files):
            size, changed = sum(file.size for file in chosen), max(file.modified or 0 for file in chosen)
            paths = tuple(storage.join(directory, file.name) for file in chosen)
            self.rows.append(Row(f"{name}: {counted(len(chosen), 'file')}", paths, size, changed, reason))


def find(store: str, needs: Needs, days: float, with_lineage: bool, now: float | None = None) -> Findings:
    """Look through a storage for what nothing needs and what did not change for so many days.

    with_lineage: whether what the lineage of other registries' versions may need is removed, too.
    """
    search = _Search(store, needs, days, with_lineage, time.time() if now is None else now)
    search.look()
    return search.findings


def find_cached(cache: Path, days: float, now: float | None = None) -> Findings:
    """Look through this user's cache for what was not used for long: compiled code, and copies of champions."""
    findings, now = Findings(), time.time() if now is None else now
    files = storage.files(str(cache)) if cache.exists() else []
    code = [file for file in files if re.fullmatch(r"[^/]+-[0-9a-f]{16}\.(so|cubin)", file.name)]
    drafts = [file for file in files if re.fullmatch(r"[^/]+-[0-9a-f]{16}\.\d+", file.name)]
    unused = f"not used for {CODE_DAYS} days"
    findings.add_files("cache: compiled code", str(cache), _older(code, now, max(days, CODE_DAYS)), unused)
    findings.add_files("cache: unfinished files", str(cache), _older(drafts, now, max(days, DRAFT_DAYS)), _KILLED)
    for item in _items(str(cache / "served")):
        if _is_older(item, now, max(days, SERVED_DAYS)):
            findings.add(f"cache: champions of registry {item.name}", [item], f"not written for {SERVED_DAYS} days")
    findings.kept["the cache"] += sum(file.size for file in files) - findings.size
    return findings


def find_ray_sessions(days: float, now: float | None = None) -> Findings:
    """Look for the directories of this user's embedded Rays, of any storage, that have ended."""
    now = time.time() if now is None else now
    return Findings(
        [
            Row(
                f"ray/{each.directory.name[:27]}",  # with its time
                each.removal(),
                each.size,
                each.changed,
                f"the embedded Ray of {Path(each.store).name} has ended",
            )
            for each in ray_sessions.unused()
            if each.changed < now - days * DAY
        ]
    )


class _Search:
    """One look through a storage."""

    def __init__(self, store: str, needs: Needs, days: float, with_lineage: bool, now: float) -> None:
        self._store, self._needs, self._days, self._now = store, needs, days, now
        self._with_lineage = with_lineage
        self._digests: set[str] = set()  # of the datasets of the runs that stay
        self.findings = Findings()

    def look(self) -> None:
        for item in _items(storage.join(self._store, "runs")):
            self._look_at_run(item)
        for item in _items(storage.join(self._store, "datasets")):
            self._look_at_dataset(item)
        for item in _items(storage.join(self._store, INITIAL)):
            with self._decide(item, self._needs.initial.get(item.name), "a copy of a model from which runs started"):
                pass
        leftovers = [
            file._replace(name=name)
            for name in storage.names(self._store)
            if storage.is_leftover(name)
            for file in storage.files(storage.join(self._store, name))
        ]
        self.findings.add_files("storage", self._store, self._drafts(leftovers), _KILLED)
        logs = storage.join(self._store, "logs")
        made = [file for file in storage.files(logs) if _LOG.fullmatch(file.name)]
        old = _older(made, self._now, max(self._days, LOG_DAYS))
        self.findings.add_files("logs", logs, old, f"not written for {LOG_DAYS} days")
        for name, shown in (("comparisons", "comparisons"), ("mlflow", "MLflow's runs and registered models")):
            self.findings.kept[shown] += sum(file.size for file in storage.files(storage.join(self._store, name)))

    def _look_at_run(self, item: Item) -> None:
        result = item.read(_RESULT)
        why = self._needs.runs.get(item.name) or self._needs.tracked.get(result.get("run", ""))
        if not why and not self._with_lineage and any(name.startswith("promotion-") for name in item.names):
            why = LINEAGE  # of a version that this registry does not have
        with self._decide(item, why, _UNNEEDED if result else _UNFINISHED) as stays:
            if stays:
                self._digests.add(_dataset_digest(item))
            if stays and result and not self._needs.unknown:
                self._look_at_checkpoints(item)

    def _look_at_checkpoints(self, run: Item) -> None:
        """Add the checkpoints that a finished training does not need."""
        items = [run.below(path.rsplit("/", 1)[1]) for path in checkpoints.spare(run.path, keep=1)]
        items = [each for each in items if each.name not in self._needs.checkpoints and self._is_old(each)]
        if items:
            name = f"runs/{run.name}: {counted(len(items), 'checkpoint')}"
            self.findings.add(name, items, "training is finished; the last and the best one stay")

    def _look_at_dataset(self, item: Item) -> None:
        manifest = item.read(MANIFEST)
        why = self._needs.datasets.get(item.name)
        if not why and manifest.get("digest") in self._digests:
            why = "training runs that stay"
        with self._decide(item, why, _UNNEEDED if manifest else _UNFINISHED) as stays:
            work = item.below(WORK_DIRECTORY)
            if stays and manifest and work.files and self._is_old(work):
                self.findings.add(f"datasets/{item.name}/{work.name}", [work], "work files of a finished dataset")

    @contextmanager
    def _decide(self, item: Item, why: str | None, reason: str) -> Iterator[bool]:
        """Yield whether an item stays, since something needs it or may need it; else it can be removed.

        Of one that stays, the block may add parts that can be removed; leftovers in it are added here.
        """
        if not why and self._needs.unknown:
            why = "what may still be needed"
        if not why and not self._is_old(item):
            why = "recent changes (--older-than)"
        name = "/".join(item.path.split("/")[-2:])
        if not why:
            self.findings.add(name, [item], reason)
            yield False
            return
        before = self.findings.size
        yield True
        left = [file for file in item.files if storage.is_leftover(file.name.rsplit("/", 1)[-1])]
        self.findings.add_files(name, item.path, self._drafts(left), _KILLED)
        self.findings.kept[why] += item.size - (self.findings.size - before)

    def _drafts(self, files: list[StoredFile]) -> list[StoredFile]:
        """Return those of these temporary files that no process can be writing."""
        return _older(files, self._now, max(self._days, DRAFT_DAYS))

    def _is_old(self, item: Item) -> bool:
        return _is_older(item, self._now, self._days)


def _items(directory: str) -> Iterator[Item]:
    """Yield the directories below this one whose names are keys."""
    inside: dict[str, list[StoredFile]] = defaultdict(list)
    for file in storage.files(directory):
        key, _, name = file.name.partition("/")
        if _KEY.fullmatch(key) and name:
            inside[key].append(file._replace(name=name))
    yield from (Item(storage.join(directory, key), files) for key, files in sorted(inside.items()))


def _is_older(item: Item, now: float, days: float) -> bool:
    return item.changed is not None and item.changed < now - days * DAY


def _older(files: Iterable[StoredFile], now: float, days: float) -> list[StoredFile]:
    return [file for file in files if file.modified is not None and file.modified < now - days * DAY]


def _dataset_digest(run: Item) -> str:
    """Return the digest of the dataset of a training run; "" if it has neither a bundle nor a checkpoint yet."""
    if digest := run.read("bundle/lineage.json").get("dataset_digest"):
        return str(digest)
    states = sorted(name for name in run.names if name.endswith(f"/{checkpoints.STATE}"))
    return str(run.read(states[-1]).get("identity", {}).get("dataset", "")) if states else ""


def remove(row: Row) -> bool:
    """Remove a row's files. Return whether all of them are gone: some may belong to another user."""
    try:
        for path in row.paths:
            storage.remove(path)
    except OSError:
        return False
    return not any(storage.exists(path) for path in row.paths)


def table(rows: list[Row], now: float | None = None) -> Table:
    """Return a table for people, the largest first, with the total."""
    now = time.time() if now is None else now
    shown = Table(box=None, pad_edge=False)
    for heading in ("what can be removed", "size", "changed", "why"):
        shown.add_column(heading, no_wrap=heading != "why", justify="right" if heading == "size" else "left")
    for row in sorted(rows, key=lambda row: -row.size):
        shown.add_row(row.name, size(row.size), _age(now - row.changed), row.reason)
    shown.add_row("total", size(sum(row.size for row in rows)), "", "")
    return shown


def kept(findings: Iterable[Findings]) -> str:
    """Return a line for people with what stays."""
    total = sum((each.kept for each in findings), Counter[str]())
    return ", ".join(f"{size(number)} for {why}" for why, number in total.most_common() if number) or "nothing"


def size(number: float) -> str:
    """Format a number of bytes."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= factor:
            return f"{number / factor:,.1f} {unit}"
    return f"{number:.0f} B"


def _age(seconds: float) -> str:
    for unit, factor in (("day", DAY), ("hour", 3600)):
        if seconds >= factor:
            return f"{counted(int(seconds // factor), unit)} ago"
    return "this hour"
