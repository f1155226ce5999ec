import random
from collections import Counter

import numpy as np
import pytest

from gru.corpus.batches import LaneOrder, LaneReader, stream_batches
from gru.errors import UserError

END = 10**6


def make(count: int = 40, seed: int = 0) -> list[np.ndarray]:
    """Segments of uneven length whose tokens are all different."""
    rng = random.Random(seed)
    sizes = [rng.randrange(1, 90) for _ in range(count)]
    return [np.arange(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(count)]


def reader(segments: list[np.ndarray], order: LaneOrder, lanes: range) -> LaneReader:
    return LaneReader(order, segments.__getitem__, END, lanes)


@pytest.mark.parametrize(("lanes", "sequence_length"), [(1, 1), (3, 7), (8, 16), (50, 5)])
def test_an_epoch_has_every_token_once(lanes: int, sequence_length: int) -> None:
    segments = make()
    order = LaneOrder([len(s) for s in segments], seed=3, lanes=lanes, sequence_length=sequence_length)
    total = sum(map(len, segments))
    seen: Counter[int] = Counter()
    with reader(segments, order, range(lanes)) as r:
        for step in range(order.steps_per_epoch):
            inputs, targets = r.batch(step)
            assert inputs.shape == targets.shape == (targets.shape[0], lanes)
            assert inputs.dtype == targets.dtype == np.int64
            seen.update(targets.reshape(-1).tolist())
    assert set(seen.values()) == {1}
    assert total - lanes < len(seen) <= total
    assert len(seen) == order.stretch * lanes


def test_a_lane_continues_its_stretch_at_each_step() -> None:
    segments = make()
    order = LaneOrder([len(s) for s in segments], seed=3, lanes=4, sequence_length=16)
    n = order.steps_per_epoch
    with reader(segments, order, range(4)) as r:
        batches = [r.batch(step) for step in range(2 * n)]
    for epoch in range(2):
        inputs, targets = (np.concatenate(x) for x in zip(*batches[epoch * n : (epoch + 1) * n], strict=True))
        assert (inputs[0] == END).all()
        assert np.array_equal(inputs[1:], targets[:-1])
        assert len(targets) == order.stretch
    first, second = (np.concatenate([t for _, t in batches[e * n : (e + 1) * n]]) for e in range(2))
    assert not np.array_equal(first, second)


def test_random_access_and_any_split_of_the_lanes_give_the_same() -> None:
    segments = make()
    order = LaneOrder([len(s) for s in segments], seed=3, lanes=6, sequence_length=10)
    steps = list(range(3 * order.steps_per_epoch))
    with reader(segments, order, range(6)) as r:
        expected = {step: r.batch(step) for step in steps}
    random.Random(0).shuffle(steps)
    for split in [(range(6),), (range(3), range(3, 6)), (range(1), range(1, 5), range(5, 6))]:
        other = LaneOrder([len(s) for s in segments], seed=3, lanes=6, sequence_length=10)
        readers = [reader(segments, other, lanes) for lanes in split]
        for step in steps:
            for got, want in zip(zip(*(r.batch(step) for r in readers), strict=True), expected[step], strict=True):
                assert np.array_equal(np.concatenate(got, axis=1), want)
        for r in readers:
            r.close()


def test_order_depends_on_the_seed_and_never_changes() -> None:
    def first(seed: int) -> list[int]:
        order = LaneOrder([1] * 8, seed=seed, lanes=1, sequence_length=8)
        return [segment for segment, _, _ in order.slices(0, 0, 0, 8)]

    assert first(0) != first(1)
    # Written down: a change of these numbers changes what a resumed run reads.
    assert first(0) == [0, 1, 6, 3, 5, 4, 2, 7]


def test_a_lane_holds_one_segment_and_reads_it_once() -> None:
    segments, reads = [np.arange(5000)] * 40, Counter[int]()

    def read(index: int) -> np.ndarray:
        reads[index] += 1
        return segments[index]

    order = LaneOrder([len(s) for s in segments], seed=0, lanes=4, sequence_length=8)
    with LaneReader(order, read, END, range(4)) as r:
        for step in range(order.steps_per_epoch - 300):  # before it reads ahead into the next epoch
            r.batch(step)
        assert len(r._current) <= 4
    assert max(reads.values()) <= 2  # twice if two lanes have a part of it


def test_a_failed_read_is_reported_when_its_batch_is_asked_for() -> None:
    segments = make()

    def read(index: int) -> np.ndarray:
        if len(done) > 3:
            raise UserError("gone")
        done.append(index)
        return segments[index]

    done: list[int] = []
    order = LaneOrder([len(s) for s in segments], seed=0, lanes=2, sequence_length=30)
    with LaneReader(order, read, END, range(2)) as r, pytest.raises(UserError, match="gone"):
        for step in range(order.steps_per_epoch):
            r.batch(step)


def test_too_few_tokens_are_reported_with_the_keys() -> None:
    message = (
        r"the corpus has 1,000 training tokens: too few for train\.batch_size = 32 lanes of "
        r"train\.sequence_length = 64 tokens"
    )
    with pytest.raises(UserError, match=message):
        LaneOrder([500, 500], seed=0, lanes=32, sequence_length=64)


@pytest.mark.parametrize("count", [0, 1, 5, 64, 100, 257])
@pytest.mark.parametrize(("lanes", "sequence_length"), [(1, 10), (4, 8), (16, 100)])
def test_stream_batches_predict_each_token_once_after_the_one_before(
    count: int, lanes: int, sequence_length: int
) -> None:
    tokens = np.arange(count, dtype=np.uint16)
    before = {0: END} | {i: i - 1 for i in range(1, count)}
    seen: list[int] = []
    for inputs, targets, weights in stream_batches(tokens, lanes, sequence_length, END):
        assert inputs.shape == targets.shape == weights.shape and inputs.shape[1] == lanes
        assert inputs.shape[0] <= sequence_length
        for previous, token in zip(inputs[weights == 1], targets[weights == 1], strict=True):
            assert before[token] == previous
            seen.append(int(token))
        assert set(np.unique(weights)) <= {0, 1}
    assert sorted(seen) == list(range(count))
