"""Functions applied to many items in parallel by Ray Data, with retries for tasks whose worker dies."""

import logging
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from gru import storage
from gru.config import PrepareResources
from gru.errors import UserError

InParallel = Callable[..., Iterator[tuple[Any, Any]]]


def map_in_parallel(in_parallel: InParallel, function: Callable[..., Any], items: Iterable[Any]) -> Iterable[Any]:
    """Return function(item) of each item in order, as `map` does, computed by Ray."""
    ordered = list(items)
    results = dict(in_parallel(function, ordered))
    return [results[item] for item in ordered]


def run_in_parallel(
    resources: PrepareResources,
    function: Callable[[Any], Any],
    items: list[Any],
    failed: dict[int, UserError] | None = None,
) -> Iterator[tuple[Any, Any]]:
    """Yield (item, function(item)) as each one is ready. A task whose worker dies is retried.

    Raises the first UserError. With `failed`, errors are collected there by the item's first element instead, and all
    items are processed.
    """
    import ray.data

    if not items:
        return
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    with ray.data.DataContext.current(context):
        rows = ray.data.from_items(
            [{"index": index, "item": pickle.dumps(item)} for index, item in enumerate(items)],
            override_num_blocks=len(items),
        )
        with warnings.catch_warnings():
            # Ray 2.60 deprecates this way to set max_retries without offering another; the default retries forever.
            warnings.simplefilter("ignore", ray.util.annotations.RayDeprecationWarning)
            results = rows.map(
                partial(_task, function=function),
                num_cpus=resources.cpus,
                memory=resources.memory,
                label_selector=resources.labels or None,
                max_retries=3,
            )
        for row in results.iter_rows():
            item, result = items[row["index"]], pickle.loads(row["result"])
            if not isinstance(result, UserError):
                yield item, result
            elif failed is None:
                raise result
            else:
                failed[item[0]] = result


def _task(row: dict[str, Any], function: Callable[[Any], Any]) -> dict[str, Any]:
    """Apply the function to a pickled item; pickles are safe here, since they pass through Ray's memory, not files."""
    try:
        with storage.full_disk_is_user_error("shards"):
            result = function(pickle.loads(row["item"]))
    except UserError as error:  # returned as a value, because Ray would log and retry a raised error
        result = error
    return {"index": row["index"], "result": pickle.dumps(result)}
