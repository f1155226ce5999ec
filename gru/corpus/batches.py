"""The batches: which tokens each lane reads at each step, from segment sizes, seed and step.

For an epoch the segments are permuted, laid end to end, and cut into as many equal stretches as there are lanes; a
lane reads its stretch one window of `sequence_length` tokens per step. A batch is a pure function of its arguments,
so there is no state to save. This module does not know workers, files or Ray.

Shapes: T time (tokens in a window), B lanes.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from types import TracebackType
from typing import Any

import numpy as np

from gru.errors import UserError

_BLOCK_TOKENS = 1024  # tokens of each lane that are assembled together

Tokens = np.ndarray[Any, np.dtype[Any]]


class LaneOrder:
    """The place in the segments where each lane reads at each step.

    segment_tokens: number of tokens in each segment. lanes: number of lanes of all workers. sequence_length: number of
    tokens that a lane reads per step. Raises UserError if there are too few tokens for one window per lane.
    """

    def __init__(self, segment_tokens: Sequence[int], seed: int, lanes: int, sequence_length: int) -> None:
        self.lanes, self.sequence_length = lanes, sequence_length
        self._sizes = np.asarray(segment_tokens, dtype=np.int64)
        self._seed = seed
        total = int(self._sizes.sum())
        self.stretch = total // lanes  # the remainder, fewer tokens than lanes, is not read in this epoch
        if self.stretch < sequence_length:
            raise UserError(
                f"the corpus has {total:,} training tokens: too few for train.batch_size = {lanes} lanes of "
                f"train.sequence_length = {sequence_length} tokens: lower one of them, or add text"
            )
        self.steps_per_epoch = -(-self.stretch // sequence_length)  # the last window of an epoch may be shorter
        self._epoch = lru_cache(maxsize=2)(self._permute)

    def begins_epoch(self, step: int) -> bool:
        """Whether this step is the first of an epoch."""
        return step % self.steps_per_epoch == 0

    def window_of(self, step: int) -> tuple[int, int, int]:
        """Return (epoch, start, stop): the lanes read tokens [start, stop) of their stretches at this step."""
        epoch, index = divmod(step, self.steps_per_epoch)
        return epoch, index * self.sequence_length, min((index + 1) * self.sequence_length, self.stretch)

    def slices(self, epoch: int, lane: int, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Return the (segment, start, stop) that tokens [start, stop) of a lane's stretch consist of, in order."""
        order, ends = self._epoch(epoch)
        position, stop = lane * self.stretch + start, lane * self.stretch + stop
        slices = []
        index = int(np.searchsorted(ends, position, side="right"))
        while position < stop:
            segment, end = int(order[index]), int(ends[index])
            begin = end - int(self._sizes[segment])
            slices.append((segment, position - begin, min(stop, end) - begin))
            position, index = end, index + 1
        return slices

    def _permute(self, epoch: int) -> tuple[Tokens, Tokens]:
        """Return the segments in this epoch's order, and the position where each one ends."""
        key = splitmix64(splitmix64(np.array([self._seed], dtype=np.uint64)) ^ np.uint64(epoch))
        order = np.argsort(splitmix64(key ^ np.arange(len(self._sizes), dtype=np.uint64)), kind="stable")
        return order, np.cumsum(self._sizes[order])


def splitmix64(x: Tokens) -> Tokens:
    """Return splitmix64 of each number, which unlike numpy's generators never changes with numpy's version.

    Steele, Lea and Flood, 2014: https://doi.org/10.1145/2714064.2660195.
    """
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class LaneReader:
    """The reader of the batches of some lanes: it prefetches the next block of several steps in a thread.

    read_segment: index of a segment -> its tokens. lanes: the lanes of this worker. Memory: two blocks, and one segment
    per lane.
    """

    def __init__(self, order: LaneOrder, read_segment: Callable[[int], Tokens], end_of_text: int, lanes: range) -> None:
        self._order, self._read, self._end_of_text, self._lanes = order, read_segment, end_of_text, lanes
        # Steps in a block; the last block of an epoch may have fewer.
        self._steps = max(1, _BLOCK_TOKENS // order.sequence_length)
        self._current: dict[int, tuple[int, Tokens]] = {}  # lane -> the segment that it reads, and its tokens
        # Only this one thread reads segments, so `_current` needs no lock.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lanes")
        self._blocks: dict[int, Future[Tokens]] = {}

    def batch(self, step: int) -> tuple[Tokens, Tokens]:
        """Return (inputs_TB, targets_TB), int64: each input is the token before its target in the lane.

        The first input of a stretch is end of text.
        """
        first, after = self._block_of(step)
        needed = {first, after}
        for other in self._blocks.keys() - needed:
            self._blocks.pop(other).cancel()
        for start in sorted(needed - self._blocks.keys()):
            self._blocks[start] = self._thread.submit(self._assemble, *self._block_of(start))
        tokens_TB = self._blocks[first].result()
        _, start, stop = self._order.window_of(step)
        begin = (step - first) * self._order.sequence_length
        end = begin + stop - start
        return tokens_TB[begin:end], tokens_TB[begin + 1 : end + 1]

    def _block_of(self, step: int) -> tuple[int, int]:
        """Return the first step of the block that has this step, and the step after its last."""
        index = step % self._order.steps_per_epoch
        epoch_start, block_start = step - index, index // self._steps * self._steps
        return epoch_start + block_start, epoch_start + min(block_start + self._steps, self._order.steps_per_epoch)

    def _assemble(self, first: int, after: int) -> Tokens:
        """Return the tokens [T + 1, lanes] of steps [first, after), preceded by the token before them in each lane."""
        epoch, start, _ = self._order.window_of(first)
        _, _, stop = self._order.window_of(after - 1)
        rows = np.full((len(self._lanes), stop - start + 1), self._end_of_text, dtype=np.int64)
        for row, lane in zip(rows, self._lanes, strict=True):
            column = 0 if start else 1
            for segment, begin, end in self._order.slices(epoch, lane, max(start - 1, 0), stop):
                if lane not in self._current or self._current[lane][0] != segment:
                    self._current[lane] = segment, self._read(segment)
                row[column : column + end - begin] = self._current[lane][1][begin:end]
                column += end - begin
        return np.ascontiguousarray(rows.T)

    def close(self) -> None:
        """Stop the reading thread."""
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
    """Yield (inputs_TB, targets_TB, weights_TB): every token is the target of the token before it exactly once.

    The tokens are cut into `lanes` equal stretches; the last one is padded with weight 0.
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
    """As `stream_batches`, for models without a carried state: windows of `context` tokens that overlap by half.

    Only the second half of a window has weight 1, except in the first window, where all tokens do. So every token is
    predicted once, from at least half a context of the tokens before it.
    """
    half = context // 2
    windows = 1 + max(0, -(-(len(tokens) - context) // half))
    padding = (0, (windows - 1) * half + context - len(tokens))
    targets_N = np.pad(tokens.astype(np.int64), padding, constant_values=end_of_text)
    inputs_N = np.concatenate([[end_of_text], targets_N[:-1]])
    weights_N = np.pad(np.ones(len(tokens), dtype=np.float32), padding)
    for first in range(0, windows, lanes):
        chosen_B = np.minimum(np.arange(first, first + lanes), windows - 1)
        positions_TB = chosen_B * half + np.arange(context)[:, None]
        weights_TB = weights_N[positions_TB]
        weights_TB[: context - half, chosen_B > 0] = 0
        weights_TB[:, np.arange(first, first + lanes) >= windows] = 0
        yield inputs_N[positions_TB], targets_N[positions_TB], weights_TB
