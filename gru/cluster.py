"""The resources of the Ray cluster's nodes, and how many processes fit on them."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from gru.config_stages import Resources

ROUNDING = 1e-6  # tolerance for shares of a CPU


def total_resources(labels: dict[str, str]) -> dict[str, float]:
    """Return the CPUs, GPUs and bytes of memory, free or not, of all nodes with these labels together."""
    matching = nodes(labels)
    return {name: sum(node["Resources"].get(name, 0) for node in matching) for name in ("CPU", "GPU", "memory")}


def nodes(labels: dict[str, str]) -> list[dict[str, Any]]:
    """Return the living nodes with these labels, as `ray.nodes` describes them."""
    import ray

    return [node for node in ray.nodes() if node["Alive"] and _matches(node["Labels"], labels)]


def _matches(node_labels: dict[str, str], selectors: dict[str, str]) -> bool:
    """Whether a node has the labels, read as Ray does: a value or in(one, another), negated by `!` before it."""
    for key, selector in selectors.items():
        values = selector.removeprefix("!").removeprefix("in(").removesuffix(")").split(",")
        if (node_labels.get(key) in [value.strip() for value in values]) == selector.startswith("!"):
            return False
    return True


def count_fitting(nodes: Iterable[Mapping[str, float]], required: Mapping[str, float]) -> float:
    """Return how many processes fit on the nodes, given what each needs; infinite if they need nothing."""
    amounts = {name: amount for name, amount in required.items() if amount}
    return sum(
        min(((node.get(name, 0) + ROUNDING) // amount for name, amount in amounts.items()), default=math.inf)
        for node in nodes
    )


def is_too_small(required: Resources, processes: int) -> bool:
    """Whether this many processes do not fit on the nodes even when these are idle."""
    return count_fitting((node["Resources"] for node in nodes(required.labels)), required.amounts()) < processes


def describe_shortage(stage: str, required: Resources) -> str:
    """Return one line with the resources that a stage needs, by their keys, and those that the nodes have."""
    keys = [f"resources.{stage}.{key} = {value}" for key, value in required.model_dump().items() if value]
    total = total_resources(required.labels)
    where = "the nodes with these labels" if required.labels else "this cluster's nodes"
    return (
        f"{', '.join(keys)}: does not fit on {where}, which have {total['CPU']:g} CPUs, {total['GPU']:g} GPUs and "
        f"{total['memory'] / 1e9:.1f} GB of memory in all, free or not"
    )
