"""What the nodes of the Ray cluster have, and how many processes find room there."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from gru.config import Resources

ROUNDING = 1e-6  # of shares of a CPU


def total_resources(labels: dict[str, str]) -> dict[str, float]:
    """The CPUs, GPUs and bytes of memory, free or not, that the nodes with these labels have together."""
    there = nodes(labels)
    return {name: sum(node["Resources"].get(name, 0) for node in there) for name in ("CPU", "GPU", "memory")}


def nodes(labels: dict[str, str]) -> list[dict[str, Any]]:
    """Those with these labels, as `ray.nodes` tells of them."""
    import ray

    return [node for node in ray.nodes() if node["Alive"] and _has(node["Labels"], labels)]


def _has(there: dict[str, str], wanted: dict[str, str]) -> bool:
    """As Ray reads a label selector: a value or in(one, another), with `!` before it if it must be none of these."""
    for key, selector in wanted.items():
        values = selector.removeprefix("!").removeprefix("in(").removesuffix(")").split(",")
        if (there.get(key) in [value.strip() for value in values]) == selector.startswith("!"):
            return False
    return True


def count_fitting(nodes: Iterable[Mapping[str, float]], wanted: Mapping[str, float]) -> float:
    """How many processes that want this find room, given what each node has; infinite where they want nothing."""
    amounts = {name: amount for name, amount in wanted.items() if amount}
    return sum(
        min(((node.get(name, 0) + ROUNDING) // amount for name, amount in amounts.items()), default=math.inf)
        for node in nodes
    )


def is_too_small(wanted: Resources, processes: int) -> bool:
    """Whether the nodes, as they are, can never give this to so many processes."""
    return count_fitting((node["Resources"] for node in nodes(wanted.labels)), wanted.amounts()) < processes


def describe_shortage(stage: str, wanted: Resources) -> str:
    """What is wanted, by its keys, and what there is."""
    keys = [f"resources.{stage}.{key} = {value}" for key, value in wanted.model_dump().items() if value]
    there = total_resources(wanted.labels)
    where = "the nodes with these labels" if wanted.labels else "this cluster's nodes"
    return (
        f"{', '.join(keys)}: no room on {where}, which have {there['CPU']:g} CPUs, {there['GPU']:g} GPUs and "
        f"{there['memory'] / 1e9:.1f} GB of memory in all, free or not"
    )
