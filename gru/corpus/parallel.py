"""Functions applied to many items: by Ray Data, with retries for tasks whose worker dies, or to one item right here.

This module does not know what the functions do.
"""

import logging
import pickle
import warnings
from collections.abc import Callable, Generator, Iterable
from functools import partial
from typing import Any

from gru import cluster, storage
from gru.config_stages import PrepareResources
from gru.errors import GaveUp, UserError

_DEFAULT_RESOURCES = PrepareResources()


class TaskRunner:
    """The place where functions are applied to items: Ray, once it is started, and until then this process.

    A single item is not worth the seconds that a Ray takes to start, unless the user has set resources for it.
    """

    def __init__(
        self, resources: PrepareResources, start_ray: Callable[[], None], progress: Callable[[str], None]
    ) -> None:
        self._resources, self._start_ray, self._progress = resources, start_ray, progress
        self._started = False

    def start(self) -> None:
        """Start Ray, or join the cluster, if this runner has not done so."""
        if self._started:
            return
        self._start_ray()
        self._started = True
        if cluster.is_too_small(self._resources, 1):
            self._progress(f"waiting: {cluster.describe_shortage('prepare', self._resources)}")

    def run(self, function: Callable[[Any], Any], items: list[Any]) -> Generator[tuple[Any, Any], None, None]:
        """Yield (item, function(item)) as each one is ready. Raises the first UserError or GaveUp when it happens.

        Closing the generator cancels the other tasks.
        """
        if not items:
            return
        if self._runs_here(len(items)):
            yield items[0], _apply(function, items[0])
            return
        self.start()
        yield from _run_on_ray(self._resources, function, items)

    def map(self, function: Callable[..., Any], items: Iterable[Any]) -> Iterable[Any]:
        """Return function(item) of each item in order, as the built-in `map` does."""
        ordered = list(items)
        results = dict(self.run(function, ordered))
        return [results[item] for item in ordered]

    def leaves_cpus_idle(self, items: int) -> bool:
        """Whether this many items need fewer CPUs than there are, so that one task may use several."""
        if self._runs_here(items):
            return True
        self.start()
        return items * self._resources.cpus < cluster.total_resources(self._resources.labels)["CPU"]

    def _runs_here(self, items: int) -> bool:
        return items <= 1 and not self._started and self._resources == _DEFAULT_RESOURCES


def _run_on_ray(
    resources: PrepareResources, function: Callable[[Any], Any], items: list[Any]
) -> Generator[tuple[Any, Any], None, None]:
    import ray.data

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
        done: Any = iter(results.iter_rows())
        try:
            for row in done:
                result = pickle.loads(row["result"])
                if isinstance(result, UserError | GaveUp):
                    raise result
                yield items[row["index"]], result
        finally:
            done.close()  # cancels the other tasks at once, not when the garbage is collected


def _task(row: dict[str, Any], function: Callable[[Any], Any]) -> dict[str, Any]:
    """Apply the function to a pickled item; pickles are safe here, since they pass through Ray's memory, not files."""
    try:
        result = _apply(function, pickle.loads(row["item"]))
    except (UserError, GaveUp) as error:  # returned as a value, because Ray would log and retry a raised error
        result = error
    return {"index": row["index"], "result": pickle.dumps(result)}


def _apply(function: Callable[[Any], Any], item: Any) -> Any:
    with storage.full_disk_is_user_error("shards"):
        return function(item)
