"""Where a registered model comes from: its bundle, run, checkpoint, dataset, tokenizer and sources.

Each link is what the bundle's lineage.json, or the manifest of its dataset, names. Knows no configuration.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from gru import storage
from gru.corpus.dataset import Dataset, open_dataset
from gru.corpus.prepare import recorded_sources
from gru.digests import DamagedFiles
from gru.errors import UserError
from gru.registry import tracking
from gru.registry.bundle import Bundle
from gru.registry.versions import Version, fetch_bundle
from gru.training import checkpoint as checkpoints

State = Literal["found", "verified", "different", "absent"]
"""verified: read now, and what it was; different: damaged, or changed; absent: it cannot be reached from here."""


@dataclass
class Link:
    name: str
    state: State
    facts: dict[str, Any] = field(default_factory=dict)
    problem: str = ""


class _Different(Exception):
    """What is there is not what it was."""


def trace(version: Version, verify: bool, progress: Callable[[str], None]) -> list[Link]:
    """The links from a version to its sources, as far as they can be followed. With `verify`, everything that can be
    reached is read and compared."""
    links = [Link("version", "found", {**vars(version)})]
    bundle: Bundle | None = None
    dataset: Dataset | None = None

    @contextmanager
    def link(name: str) -> Iterator[Link]:
        progress(name)
        links.append(made := Link(name, "found"))
        try:
            yield made
        except (_Different, DamagedFiles) as error:
            made.state, made.problem = "different", str(error)
        except Exception as error:  # of whatever kind a registry, a file system or a format has
            made.state, made.problem = "absent", (str(error).splitlines() or [repr(error)])[0]

    with link("bundle") as made:
        with tempfile.TemporaryDirectory(prefix="gru-bundle-") as temporary:
            bundle = fetch_bundle(version, Path(temporary))  # which verifies its files
        config = bundle.model.config
        made.facts = {"digest": bundle.digest, "model": config.model_dump(), "vocabulary": bundle.model.vocab_size}
        _same("digest", bundle.digest, version.bundle or bundle.digest)
        made.state = "verified"
    if bundle is None:
        return links
    told = bundle.lineage
    with link("run") as made:
        run = tracking.find_run(told["run"])
        info = run.client.get_run(run.id)
        made.facts = {"id": run.id, "url": run.url, "status": info.info.status}
        key = info.data.tags[tracking.KEY_TAG]
    with link("checkpoint") as made:
        if links[-2].state == "absent":
            raise LookupError("only its run says where it is")
        made.facts = {"step": told["checkpoint_step"]}
        root = told["dataset"].rsplit("/datasets/", 1)[0]
        _check_checkpoint(made, bundle, storage.join(root, "runs", key), verify)
    with link("dataset") as made:
        made.facts = {"path": told["dataset"], "digest": told["dataset_digest"]}
        dataset = _opened(told["dataset"])
        counts = dataset.manifest.counts
        made.facts |= {"documents": counts.documents, "tokens": counts.tokens, "shards": len(dataset.manifest.shards)}
        _same("digest", dataset.manifest.digest, told["dataset_digest"])
        if verify:
            _verify(dataset)
            made.state = "verified"
    with link("tokenizer") as made:
        made.facts = {"digest": told["tokenizer_digest"]}
        _same("digest of the bundle's", bundle.tokenizer.digest, told["tokenizer_digest"])
        if dataset:
            _same("digest of the dataset's", dataset.manifest.tokenizer_digest, told["tokenizer_digest"])
        made.state = "verified"
    with link("sources") as made:
        made.facts = {"names": told["sources"]}
        if dataset is None:
            raise LookupError("only the dataset says what they held")
        _check_sources(made, dataset, verify)
    return links


def _check_checkpoint(made: Link, bundle: Bundle, directory: str, verify: bool) -> None:
    step = bundle.lineage["checkpoint_step"]
    found = [path for path in checkpoints.paths(directory) if f"/step-{step:09d}-" in path]
    if not found:
        raise FileNotFoundError(f"{directory} has none of step {step:,}")
    made.facts["path"] = found[0]
    if verify:
        weights = checkpoints.load(found[0]).tensors["ema"]
        served = bundle.model.state_dict()
        if set(weights) != set(served) or not all(torch.equal(weights[name], served[name]) for name in served):
            raise _Different(f"{found[0]}: its average is not the bundle's weights")
        made.state = "verified"


def _opened(path: str) -> Dataset:
    try:
        return open_dataset(path)
    except UserError as error:
        if "damaged" in str(error):
            raise _Different(str(error)) from None
        raise


def _verify(dataset: Dataset) -> None:
    try:
        dataset.verify()
    except UserError as error:
        raise _Different(str(error)) from None


def _check_sources(made: Link, dataset: Dataset, verify: bool) -> None:
    known = dataset.manifest.sources
    made.facts |= {"files": len(known), "bytes": sum(source.size for source in known)}
    if not verify:
        return
    found = {source.name: source for source in recorded_sources(dataset.manifest.corpus)}
    for source in known:
        if source != found.pop(source.name, None):
            raise _Different(f"{source.name} has changed, or is gone")
    if found:
        raise _Different(f"{len(found):,} files are new, {next(iter(found))} for one")
    made.state = "verified"


def _same(what: str, found: str, wanted: str) -> None:
    if found != wanted:
        raise _Different(f"its {what} is {found}, not {wanted}")


def report(spec: str, links: list[Link]) -> str:
    """For people: a line for each link."""
    version = links[0].facts
    created = time.strftime("%Y-%m-%d %H:%M", time.localtime(version["created"]))
    head = f"{spec}: version {version['version']}, {version['bits_per_byte']:.3f} bits per byte, registered {created}"
    rows = [f"  {link.name:11} {link.state:10} {link.problem or _words(link)}" for link in links[1:]]
    return "\n".join([head, *rows])


def _words(link: Link) -> str:
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
        case "dataset":
            return f"{facts['path']}  {facts['documents']:,} documents, {facts['tokens']:,} tokens"
        case "tokenizer":
            return str(facts["digest"][:16])
        case _:
            return f"{', '.join(facts['names'])}  {facts['files']:,} files, {facts['bytes'] / 1e6:,.1f} MB"
