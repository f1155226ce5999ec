"""The files of infra/, parsed, and how to look things up in them."""

import functools
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
README = (INFRA / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
IMAGE = f"gru-pipeline:{PROJECT['project']['version']}"
KUBERNETES = "1.34"
CONFIG_PATH = "/etc/gru/pipeline/pipeline.toml"
RAY_KINDS = ("RayCluster", "RayJob", "RayService")

Manifest = dict[str, Any]

COMPOSE: dict[str, Any] = yaml.safe_load((INFRA / "compose.yaml").read_text())
PROMETHEUS: dict[str, Any] = yaml.safe_load((INFRA / "prometheus.yaml").read_text())
RAY_UP: dict[str, Any] = yaml.safe_load((INFRA / "ray-up.yaml").read_text())
DASHBOARD: dict[str, Any] = json.loads((INFRA / "grafana-dashboard.json").read_text())


@functools.cache
def all_manifests() -> list[Manifest]:
    """The Kubernetes manifests of infra/kubernetes/."""
    files = sorted(set((INFRA / "kubernetes").glob("*.yaml")) - {INFRA / "kubernetes" / "kustomization.yaml"})
    return [manifest for file in files for manifest in yaml.safe_load_all(file.read_text())]


def manifests(*kinds: str) -> list[Manifest]:
    """The Kubernetes manifests of these kinds, or else all."""
    return [manifest for manifest in all_manifests() if not kinds or manifest["kind"] in kinds]


def name(manifest: Manifest) -> str:
    metadata = manifest["metadata"]
    return f"{manifest['kind']}/{metadata.get('name') or metadata['generateName']}"


def mappings(value: Any) -> Iterator[Any]:
    """Yield all mappings in a document."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from mappings(each)


def values(document: Any, key: str) -> list[Any]:
    """The values of a key, wherever it is in a document."""
    return [node[key] for node in mappings(document) if key in node]


def pods() -> list[dict[str, Any]]:
    """The pod templates of all manifests."""
    return values(manifests(), "template")


def pinned(package: str) -> str:
    """The version of a package in constraints.txt."""
    [version] = re.findall(rf"^{package}==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    return version
