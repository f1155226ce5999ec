"""The batches: which tokens each lane reads at each step, from segment sizes and weights, seed and step.

For an epoch the segments are permuted, laid end to end, and cut into as many equal stretches as there are lanes; a
lane reads its stretch one window of `sequence_length` tokens per step. A segment of weight 2 is there twice, one of
weight 0.25 in every fourth epoch. A batch is a pure function of its arguments, so there is no state to save. This
module does not know workers, files or Ray.

Shapes: T time (tokens in a window), B lanes.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from threading import Lock
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from gru.errors import UserError

_BLOCK_TOKENS = 1024  # tokens of each lane that are assembled together
_UNIT_BITS = 20  # weights are multiples of 2^-20, so that sums of them are exact
_UNIT = 1 << _UNIT_BITS
_PHASES = (1 << 64) - 1  # in place of an epoch's number, for numbers that are the same in all epochs

Tokens = np.ndarray[Any, np.dtype[Any]]


class Epoch(NamedTuple):
    """A pass over the text."""

    number: int
    first_step: int
    steps: int
    stretch: int  # tokens that each lane reads; the last window may be shorter than the others


class LaneOrder:
    """The place in the segments where each lane reads at each step.

    segment_tokens: number of tokens in each segment. lanes: number of lanes of all workers. sequence_length: number of
    tokens that a lane reads per step. weights: how often an epoch reads each segment; None: once.
    Raises UserError if an average epoch has too few tokens for one window per lane.
    """

    def __init__(
        self,
        segment_tokens: Sequence[int],
        seed: int,
        lanes: int,
        sequence_length: int,
        weights: Sequence[float] | None = None,
    ) -> None:
        self.lanes, self.sequence_length = lanes, sequence_length
        self._sizes = np.asarray(segment_tokens, dtype=np.int64)
        self._seed = seed
        self._weights = _in_units(np.ones(len(self._sizes)) if weights is None else np.asarray(weights))
        self._phases = self._spread_phases()
        total = sum(map(int.__mul__, self._weights.tolist(), self._sizes.tolist())) // _UNIT
        if total // lanes < sequence_length:
            weighted = " in an epoch, by the weights of the sources" if (self._weights != _UNIT).any() else ""
            raise UserError(
                f"the corpus has {total:,} training tokens{weighted}: too few for train.batch_size = {lanes} lanes of "
                f"train.sequence_length = {sequence_length} tokens: lower one of them, or add text"
            )
        self._lock = Lock()  # a reader's thread asks as well
        self._epochs: list[Epoch] = []
        self._ends: list[int] = []  # step after the last one of each epoch
        self._permuted = lru_cache(maxsize=2)(self._permute)

    def epoch(self, number: int) -> Epoch:
        """Return the epoch of this number. With weights epochs differ in length; one without a step is possible."""
        with self._lock:
            while len(self._epochs) <= number:
                self._append_epoch()
        return self._epochs[number]

    def epoch_at(self, step: int) -> Epoch:
        """Return the epoch that has this step."""
        with self._lock:
            while not self._ends or self._ends[-1] <= step:
                self._append_epoch()
        return self._epochs[bisect_right(self._ends, step)]

    def _append_epoch(self) -> None:
        number, first_step = len(self._epochs), self._ends[-1] if self._ends else 0
        # The remainder, fewer tokens than lanes, is not read in this epoch.
        stretch = int((self._counts(number) * self._sizes).sum()) // self.lanes
        steps = -(-stretch // self.sequence_length)
        self._epochs.append(Epoch(number, first_step, steps, stretch))
        self._ends.append(first_step + steps)

    def window_of(self, step: int) -> tuple[int, int, int]:
        """Return (epoch, start, stop): the lanes read tokens [start, stop) of their stretches at this step."""
        epoch = self.epoch_at(step)
        start = (step - epoch.first_step) * self.sequence_length
        return epoch.number, start, min(start + self.sequence_length, epoch.stretch)

    def tokens_before(self, step: int) -> int:
        """Return the number of tokens that all lanes together read in the steps before this one."""
        epoch, start, _ = self.window_of(step)
        return self.lanes * (sum(self.epoch(number).stretch for number in range(epoch)) + start)

    def slices(self, epoch: int, lane: int, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Return the (segment, start, stop) that tokens [start, stop) of a lane's stretch consist of, in order."""
        order, ends = self._permuted(epoch)
        stretch = self.epoch(epoch).stretch
        position, stop = lane * stretch + start, lane * stretch + stop
        slices = []
        index = int(np.searchsorted(ends, position, side="right"))
        while position < stop:
            segment, end = int(order[index]), int(ends[index])
            begin = end - int(self._sizes[segment])
            slices.append((segment, position - begin, min(stop, end) - begin))
            position, index = end, index + 1
        return slices

    def _counts(self, epoch: int) -> Tokens:
        """Return how often the epoch reads each segment: how many integers its weights, added up, pass in it."""
        before, after = (self._weights * number + self._phases for number in (epoch, epoch + 1))
        return (after >> _UNIT_BITS) - (before >> _UNIT_BITS)

    def _permute(self, epoch: int) -> tuple[Tokens, Tokens]:
        """Return the segments in this epoch's order, each as often as it is read, and the position where each ends."""
        counts = self._counts(epoch)
        segments = np.repeat(np.arange(len(counts), dtype=np.uint64), counts)
        copies = np.arange(len(segments)) - np.repeat(np.cumsum(counts) - counts, counts)
        order = np.argsort(self._random(epoch, segments | copies.astype(np.uint64) << np.uint64(32)), kind="stable")
        order = segments[order].astype(np.int64)
        return order, np.cumsum(self._sizes[order])

    def _spread_phases(self) -> Tokens:
        """Return the phase of each segment: those of one weight are a permutation of 0/n, 1/n ... (n-1)/n.

        So an epoch has w n of n segments of weight w, rounded up or down: sum floor(x + i/n) = floor(n x) (Hermite).
        """
        phases = np.zeros(len(self._sizes), dtype=np.int64)
        ranks = self._random(_PHASES, np.arange(len(self._sizes), dtype=np.uint64))
        for weight in np.unique(self._weights):
            same = np.flatnonzero(self._weights == weight)
            phases[same[np.argsort(ranks[same], kind="stable")]] = np.arange(len(same)) * _UNIT // len(same)
        return phases

    def _random(self, epoch: int, numbers: Tokens) -> Tokens:
        """Return a pseudorandom number for each number, by seed and epoch."""
        key = splitmix64(splitmix64(np.array([self._seed], dtype=np.uint64)) ^ np.uint64(epoch))
        return splitmix64(key ^ numbers)


def _in_units(weights: Tokens) -> Tokens:
    """Return weights as positive multiples of 2^-20."""
    return np.maximum(np.rint(weights * _UNIT), 1).astype(np.int64)


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
        epoch = self._order.epoch_at(step)
        first = epoch.first_step + (step - epoch.first_step) // self._steps * self._steps
        return first, min(first + self._steps, epoch.first_step + epoch.steps)

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
