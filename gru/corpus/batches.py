"""Which tokens are read when: (segment token counts, seed, step, lane) -> a window of tokens.

For an epoch the segments are permuted, laid end to end, and cut into as many equal stretches as there are lanes;
a lane reads its stretch window by window. Pure functions of their arguments, with no state to save: nothing here
knows of workers, files or Ray.

Shapes: T time (tokens of a window), B lanes.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from types import TracebackType
from typing import Any

import numpy as np

from gru.errors import UserError

_BLOCK_TOKENS = 1024  # of each lane that are assembled together

Tokens = np.ndarray[Any, np.dtype[Any]]
Batch = tuple[Tokens, Tokens]


class LaneOrder:
    """Where in the segments each lane reads at each step.

    segment_tokens: tokens in each segment. lanes: streams in all. window: tokens that a lane reads in a step.
    Raises UserError if there are too few tokens for a window in each lane.
    """

    def __init__(self, segment_tokens: Sequence[int], seed: int, lanes: int, sequence_length: int) -> None:
        self.lanes, self.sequence_length = lanes, sequence_length
        self._sizes = np.asarray(segment_tokens, dtype=np.int64)
        self._seed = seed
        total = int(self._sizes.sum())
        self.stretch = total // lanes  # what is left over, fewer tokens than lanes, waits for another epoch
        if self.stretch < sequence_length:
            raise UserError(
                f"the corpus has {total:,} training tokens: too few for train.batch_size = {lanes} lanes of "
                f"train.sequence_length = {sequence_length} tokens"
            )
        self.steps_per_epoch = -(-self.stretch // sequence_length)  # the last window of an epoch may be shorter
        self._epoch = lru_cache(maxsize=2)(self._permute)

    def begins_epoch(self, step: int) -> bool:
        return step % self.steps_per_epoch == 0

    def window_of(self, step: int) -> tuple[int, int, int]:
        """(epoch, start, stop): which tokens of their stretches the lanes read."""
        epoch, index = divmod(step, self.steps_per_epoch)
        return epoch, index * self.sequence_length, min((index + 1) * self.sequence_length, self.stretch)

    def slices(self, epoch: int, lane: int, start: int, stop: int) -> list[tuple[int, int, int]]:
        """The (segment, start, stop) that tokens [start, stop) of the lane's stretch are made of, in order."""
        order, ends = self._epoch(epoch)
        position, stop = lane * self.stretch + start, lane * self.stretch + stop
        slices = []
        place = int(np.searchsorted(ends, position, side="right"))
        while position < stop:
            segment, end = int(order[place]), int(ends[place])
            begin = end - int(self._sizes[segment])
            slices.append((segment, position - begin, min(stop, end) - begin))
            position, place = end, place + 1
        return slices

    def _permute(self, epoch: int) -> tuple[Tokens, Tokens]:
        """The segments in this epoch's order, and where each one ends."""
        key = _splitmix64(_splitmix64(np.array([self._seed], dtype=np.uint64)) ^ np.uint64(epoch))
        order = np.argsort(_splitmix64(key ^ np.arange(len(self._sizes), dtype=np.uint64)), kind="stable")
        return order, np.cumsum(self._sizes[order])


def _splitmix64(x: Tokens) -> Tokens:
    """Steele, Lea and Flood, 2014: https://doi.org/10.1145/2714064.2660195. The same in every version of numpy."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class LaneReader:
    """Batches of some of the lanes, read in blocks of several steps, the next block while this one is worked on.

    read_segment: index of a segment -> its tokens. lanes: those that this worker owns. Memory: two blocks, and a
    segment for each lane.
    """

    def __init__(self, order: LaneOrder, read_segment: Callable[[int], Tokens], end_of_text: int, lanes: range) -> None:
        self._order, self._read, self._end_of_text, self._lanes = order, read_segment, end_of_text, lanes
        self._steps = max(
            1, _BLOCK_TOKENS // order.sequence_length
        )  # in a block; the last one of an epoch may have fewer
        self._last: dict[int, tuple[int, Tokens]] = {}  # of each lane: the segment that it goes on in
        # All reading happens in this one thread, so these need no lock.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lanes")
        self._blocks: dict[int, Future[Tokens]] = {}

    def batch(self, step: int) -> Batch:
        """(inputs_TB, targets_TB), int64: each input is the token that the lane read before its target.

        A stretch begins with end of text as its first input.
        """
        first, after = self._block_of(step)
        wanted = {first, after}
        for other in self._blocks.keys() - wanted:
            self._blocks.pop(other).cancel()
        for start in sorted(wanted - self._blocks.keys()):
            self._blocks[start] = self._thread.submit(self._assemble, *self._block_of(start))
        tokens_TB = self._blocks[first].result()
        _, start, stop = self._order.window_of(step)
        begin = (step - first) * self._order.sequence_length
        end = begin + stop - start
        return tokens_TB[begin:end], tokens_TB[begin + 1 : end + 1]

    def _block_of(self, step: int) -> tuple[int, int]:
        """The first step of the block, and the one after its last."""
        index = step % self._order.steps_per_epoch
        epoch_start, block_start = step - index, index // self._steps * self._steps
        return epoch_start + block_start, epoch_start + min(block_start + self._steps, self._order.steps_per_epoch)

    def _assemble(self, first: int, after: int) -> Tokens:
        """Tokens [T + 1, lanes] of these steps, after the one that each lane read before them."""
        epoch, start, _ = self._order.window_of(first)
        _, _, stop = self._order.window_of(after - 1)
        rows = np.full((len(self._lanes), stop - start + 1), self._end_of_text, dtype=np.int64)
        for row, lane in zip(rows, self._lanes, strict=True):
            place = 0 if start else 1
            for segment, begin, end in self._order.slices(epoch, lane, max(start - 1, 0), stop):
                if lane not in self._last or self._last[lane][0] != segment:
                    self._last[lane] = segment, self._read(segment)
                row[place : place + end - begin] = self._last[lane][1][begin:end]
                place += end - begin
        return np.ascontiguousarray(rows.T)

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    def __enter__(self) -> "LaneReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def stream_batches(
    tokens: Tokens, lanes: int, sequence_length: int, end_of_text: int
) -> Iterator[tuple[Tokens, Tokens, Tokens]]:
    """Yield (inputs_TB, targets_TB, weights_TB): every token is a target exactly once, after the one before it.

    The tokens are laid into `lanes` equal stretches, the last of them padded with weight 0.
    """
    stretch = -(-len(tokens) // lanes)
    padding = (0, stretch * lanes - len(tokens))
    targets_BN = np.pad(tokens.astype(np.int64), padding, constant_values=end_of_text).reshape(lanes, stretch)
    inputs_BN = np.concatenate([[end_of_text], targets_BN.reshape(-1)])[: targets_BN.size].reshape(targets_BN.shape)
    weights_BN = np.pad(np.ones(len(tokens), dtype=np.float32), padding).reshape(targets_BN.shape)
    for start in range(0, stretch, sequence_length):
        columns = slice(start, start + sequence_length)
        inputs, targets, weights = (a[:, columns].T.copy() for a in (inputs_BN, targets_BN, weights_BN))
        yield inputs, targets, weights


def sliding_batches(
    tokens: Tokens, lanes: int, context: int, end_of_text: int
) -> Iterator[tuple[Tokens, Tokens, Tokens]]:
    """As `stream_batches`, for models that carry no state: windows of `context` tokens, each begun half of that after
    the one before, in which only the second half has weight 1, but for the first window. So every token is predicted
    from at least half a context of what is before it, and once."""
    half = context // 2
    windows = 1 + max(0, -(-(len(tokens) - context) // half))
    padding = (0, (windows - 1) * half + context - len(tokens))
    targets_N = np.pad(tokens.astype(np.int64), padding, constant_values=end_of_text)
    inputs_N = np.concatenate([[end_of_text], targets_N[:-1]])
    weights_N = np.pad(np.ones(len(tokens), dtype=np.float32), padding)
    for first in range(0, windows, lanes):
        chosen_B = np.minimum(np.arange(first, first + lanes), windows - 1)
        places_TB = chosen_B * half + np.arange(context)[:, None]
        weights_TB = weights_N[places_TB]
        weights_TB[: context - half, chosen_B > 0] = 0
        weights_TB[:, np.arange(first, first + lanes) >= windows] = 0
        yield inputs_N[places_TB], targets_N[places_TB], weights_TB
