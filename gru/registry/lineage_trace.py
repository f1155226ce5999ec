"""Follow the lineage of a registered model: its bundle, run, checkpoint, dataset, tokenizer and sources.

Each link is named by the bundle's lineage.json or by the manifest of its dataset. This module knows no configuration,
and of checkpoints and initial models only their paths: the caller says how one is read.
"""

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from gru import storage
from gru.config import is_model_reference
from gru.corpus.dataset import Dataset, open_dataset
from gru.corpus.prepare import recorded_sources
from gru.digests import DamagedFiles
from gru.errors import UserError, first_line
from gru.model.language_model import with_current_names
from gru.registry import tracking
from gru.registry.bundle import Bundle
from gru.registry.versions import Version, fetch_bundle, find
from gru.terminal import counted

State = Literal["found", "verified", "different", "absent"]
"""found: it exists; verified: it was read, and equals its record; different: it is damaged or has changed;
absent: it cannot be reached from here."""

LoadAverage = Callable[[str], Mapping[str, Tensor]]
"""Returns the averaged weights in the checkpoint directory at a path. Raises DamagedFiles."""

DigestAt = Callable[[str], str]
"""Returns the digest of the initial model, a bundle or a checkpoint, at a path. Raises UserError or DamagedFiles."""


@dataclass
class Link:
    """One origin of a model, and whether it is still the same."""

    name: str
    state: State
    facts: dict[str, Any] = field(default_factory=dict)
    problem: str = ""


class _Different(Exception):
    """An origin that differs from its record."""


def trace(
    version: Version, verify: bool, progress: Callable[[str], None], load_average: LoadAverage, digest_at: DigestAt
) -> list[Link]:
    """Return the links from a version to its sources, as far as they can be followed.

    With `verify`, everything that can be reached is read and compared. `progress` is called with the name of each link.
    """
    return _Trace(version, verify, progress, load_average, digest_at).follow()


class _Trace:
    """One walk along the links; each method checks one of them."""

    def __init__(
        self,
        version: Version,
        verify: bool,
        progress: Callable[[str], None],
        load_average: LoadAverage,
        digest_at: DigestAt,
    ) -> None:
        self._version, self._verify = version, verify
        self._progress, self._load_average, self._digest_at = progress, load_average, digest_at
        self._links = [Link("version", "found", {**vars(version)})]
        self._dataset: Dataset | None = None

    def follow(self) -> list[Link]:
        bundle: Bundle | None = None
        with self._link("bundle") as link:
            bundle = self._fetch_bundle()
            self._check_bundle(link, bundle)
        if bundle is None:
            return self._links
        for name, check in (
            ("run", self._check_run),
            ("checkpoint", self._check_checkpoint),
            *([("initial", self._check_initial)] if bundle.lineage.initial else []),
            ("dataset", self._check_dataset),
            ("tokenizer", self._check_tokenizer),
            ("sources", self._check_sources),
        ):
            with self._link(name) as link:
                check(link, bundle)
        return self._links

    @contextmanager
    def _link(self, name: str) -> Iterator[Link]:
        self._progress(name)
        link = Link(name, "found")
        self._links.append(link)
        try:
            yield link
        except (_Different, DamagedFiles) as error:
            link.state, link.problem = "different", str(error)
        except Exception as error:  # a registry, a file system and a format each raise their own kinds
            link.state, link.problem = "absent", first_line(error)

    def _fetch_bundle(self) -> Bundle:
        with tempfile.TemporaryDirectory(prefix="gru-bundle-") as temporary:
            return fetch_bundle(self._version, Path(temporary))  # verifies its files

    def _check_bundle(self, link: Link, bundle: Bundle) -> None:
        config = bundle.model.config
        link.facts = {"digest": bundle.digest, "model": config.model_dump(), "vocabulary": bundle.model.vocab_size}
        _require_same("digest", bundle.digest, self._version.bundle or bundle.digest)
        link.state = "verified"

    def _check_run(self, link: Link, bundle: Bundle) -> None:
        run = tracking.find_run(bundle.lineage.run)
        link.facts = {"id": run.id, "url": run.url, "status": run.client.get_run(run.id).info.status}

    def _check_checkpoint(self, link: Link, bundle: Bundle) -> None:
        path = bundle.lineage.checkpoint
        link.facts = {"step": bundle.lineage.checkpoint_step}
        if path is None:
            raise LookupError("its bundle does not record the checkpoint's path")
        if not storage.exists(path):
            raise FileNotFoundError(f"{path} does not exist")
        link.facts["path"] = path
        if self._verify:
            weights, served = with_current_names(self._load_average(path)), bundle.model.state_dict()
            if set(weights) != set(served) or not all(torch.equal(weights[name], served[name]) for name in served):
                raise _Different(f"{path}: its averaged weights differ from the bundle's weights")
            link.state = "verified"

    def _check_initial(self, link: Link, bundle: Bundle) -> None:
        name, digest = bundle.lineage.initial, bundle.lineage.initial_digest
        assert name is not None and digest is not None
        link.facts = {"name": name, "digest": digest}
        if not is_model_reference(name):
            if not storage.exists(name):
                raise FileNotFoundError(f"{name} does not exist")
            if self._verify:
                self._verify_initial(name, digest)
                link.state = "verified"
            return
        version = find(name)
        _require_same("digest", version.bundle, digest)
        if self._verify:
            with tempfile.TemporaryDirectory(prefix="gru-bundle-") as temporary:
                _require_same("digest", fetch_bundle(version, Path(temporary)).digest, digest)
            link.state = "verified"

    def _verify_initial(self, path: str, digest: str) -> None:
        try:
            _require_same("digest", self._digest_at(path), digest)
        except UserError as error:  # the path has something else now
            raise _Different(f"{path}: {error}") from None

    def _check_dataset(self, link: Link, bundle: Bundle) -> None:
        lineage = bundle.lineage
        link.facts = {"path": lineage.dataset, "digest": lineage.dataset_digest}
        manifest = self._open_dataset(lineage.dataset).manifest
        counts = manifest.counts
        link.facts |= {"documents": counts.documents, "tokens": counts.tokens, "shards": len(manifest.shards)}
        _require_same("digest", manifest.digest, lineage.dataset_digest)
        if self._verify:
            self._verify_dataset()
            link.state = "verified"

    def _open_dataset(self, path: str) -> Dataset:
        try:
            self._dataset = open_dataset(path)
        except UserError as error:
            if "damaged" in str(error):
                raise _Different(str(error)) from None
            raise
        return self._dataset

    def _verify_dataset(self) -> None:
        assert self._dataset is not None
        try:
            self._dataset.verify()
        except UserError as error:
            raise _Different(str(error)) from None

    def _check_tokenizer(self, link: Link, bundle: Bundle) -> None:
        digest = bundle.lineage.tokenizer_digest
        link.facts = {"digest": digest}
        _require_same("digest in the bundle", bundle.tokenizer.digest, digest)
        if self._dataset:
            _require_same("digest in the dataset", self._dataset.manifest.tokenizer_digest, digest)
        link.state = "verified"

    def _check_sources(self, link: Link, bundle: Bundle) -> None:
        link.facts = {"names": bundle.lineage.sources}
        if self._dataset is None:
            raise LookupError("the dataset is absent, and only it records the contents of its sources")
        manifest = self._dataset.manifest
        link.facts |= {"files": len(manifest.sources), "bytes": sum(source.size for source in manifest.sources)}
        if not self._verify:
            return
        current = Counter(recorded_sources(manifest.corpus, self._dataset.directory))
        for source in manifest.sources:
            if not current[source]:
                raise _Different(f"{source.name} has changed or does not exist any more")
            current[source] -= 1
        if new := [*current.elements()]:
            raise _Different(f"{counted(len(new), 'new file')}, for example {new[0].name}")
        link.state = "verified"


def _require_same(what: str, actual: str, expected: str) -> None:
    if actual != expected:
        raise _Different(f"its {what} is {actual}, expected {expected}")


def report(spec: str, links: list[Link]) -> str:
    """Return a report for people, a line for each link."""
    version = links[0].facts
    created = time.strftime("%Y-%m-%d %H:%M", time.localtime(version["created"]))
    head = f"{spec}: version {version['version']}, {version['bits_per_byte']:.3f} bits per byte, registered {created}"
    rows = [f"  {link.name:11} {link.state:10} {link.problem or _summary(link)}" for link in links[1:]]
    return "\n".join([head, *rows])


def _summary(link: Link) -> str:
    facts = link.facts
    match link.name:
        case "bundle":
            model = facts["model"]
            shape = f"{model['cell']}, {model['layers']} x {model['hidden']}, vocabulary {facts['vocabulary']:,}"
            return f"{facts['digest'][:16]}  {shape}"
        case "run":
            return f"{facts['url']}  {facts['status'].lower()}"
        case "checkpoint":
            return str(facts["path"])
        case "initial":
            return f"started from {facts['name']} ({facts['digest'][:16]})"
        case "dataset":
            return f"{facts['path']}  {counted(facts['documents'], 'document')}, {counted(facts['tokens'], 'token')}"
        case "tokenizer":
            return str(facts["digest"][:16])
        case _:
            return f"{', '.join(facts['names'])}  {counted(facts['files'], 'file')}, {facts['bytes'] / 1e6:,.1f} MB"
