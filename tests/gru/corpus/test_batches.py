import itertools
import random
from collections import Counter

import numpy as np
import pytest

from gru.config import CorpusConfig
from gru.corpus.batches import LaneOrder, LaneReader, stream_batches
from gru.corpus.dataset import Counts, Dataset, Manifest, Shard
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
        for step in range(order.epoch(0).steps):
            inputs, targets = r.batch(step)
            assert inputs.shape == targets.shape == (targets.shape[0], lanes)
            assert inputs.dtype == targets.dtype == np.int64
            seen.update(targets.reshape(-1).tolist())
    assert set(seen.values()) == {1}
    assert total - lanes < len(seen) <= total
    assert order.tokens_before(0) == 0
    steps = order.epoch(0).steps
    assert [order.tokens_before(n * steps) for n in (1, 3)] == [len(seen), 3 * len(seen)]
    assert order.tokens_before(2 * steps + 1) == 2 * len(seen) + lanes * sequence_length
    assert len(seen) == order.epoch(0).stretch * lanes


def test_a_lane_continues_its_stretch_at_each_step() -> None:
    segments = make()
    order = LaneOrder([len(s) for s in segments], seed=3, lanes=4, sequence_length=16)
    n = order.epoch(0).steps
    with reader(segments, order, range(4)) as r:
        batches = [r.batch(step) for step in range(2 * n)]
    for epoch in range(2):
        inputs, targets = (np.concatenate(x) for x in zip(*batches[epoch * n : (epoch + 1) * n], strict=True))
        assert (inputs[0] == END).all()
        assert np.array_equal(inputs[1:], targets[:-1])
        assert len(targets) == order.epoch(0).stretch
    first, second = (np.concatenate([t for _, t in batches[e * n : (e + 1) * n]]) for e in range(2))
    assert not np.array_equal(first, second)


def test_random_access_and_any_split_of_the_lanes_give_the_same() -> None:
    segments = make()
    order = LaneOrder([len(s) for s in segments], seed=3, lanes=6, sequence_length=10)
    steps = list(range(3 * order.epoch(0).steps))
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
        for step in range(order.epoch(0).steps - 300):  # before it reads ahead into the next epoch
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
        for step in range(order.epoch(0).steps):
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


def readings(order: LaneOrder, epoch: int) -> Counter[int]:
    """Return how many tokens of each segment the lanes read in an epoch."""
    seen: Counter[int] = Counter()
    for lane in range(order.lanes):
        for segment, start, stop in order.slices(epoch, lane, 0, order.epoch(epoch).stretch):
            seen[segment] += stop - start
    return seen


WEIGHTS = [2.0] * 8 + [0.25] * 8 + [1.0] * 4 + [1.5] * 4


@pytest.mark.parametrize("seed", range(3))
def test_a_weight_is_how_often_an_epoch_reads_a_segment(seed: int) -> None:
    order = LaneOrder([10] * 24, seed, lanes=1, sequence_length=7, weights=WEIGHTS)
    total: Counter[int] = Counter()
    for epoch in range(8):
        counts = readings(order, epoch)
        assert [counts[segment] for segment in range(8)] == [20] * 8
        assert [counts[segment] for segment in range(16, 20)] == [10] * 4
        assert sum(counts[segment] for segment in range(8, 16)) == 20, "a quarter of the segments"
        assert sum(counts[segment] for segment in range(20, 24)) == 60
        total += counts
        if epoch == 3:
            assert [total[segment] for segment in range(8, 16)] == [10] * 8, "each is read once in four epochs"
    assert [total[segment] for segment in range(24)] == [int(8 * 10 * weight) for weight in WEIGHTS]


@pytest.mark.parametrize("weights", [[1.0] * 40, [1] * 40])
def test_weights_of_one_change_nothing(weights: list[float]) -> None:
    sizes = [len(segment) for segment in make()]
    plain, weighted = (LaneOrder(sizes, 3, 4, 16, each) for each in (None, weights))
    for step in range(3 * plain.epoch(0).steps):
        assert weighted.window_of(step) == plain.window_of(step)
        window = plain.window_of(step)
        for lane in range(4):
            assert weighted.slices(window[0], lane, *window[1:]) == plain.slices(window[0], lane, *window[1:])
    # Written down: a change of these numbers changes what a resumed run reads.
    assert plain.slices(1, 0, 0, 30) == [(5, 0, 30)]
    assert plain.slices(2, 3, 100, 116) == [(37, 26, 42)]


def test_copies_of_a_segment_are_apart() -> None:
    order = LaneOrder([1] * 100, 0, lanes=1, sequence_length=10, weights=[3.0] * 100)
    sequence = [segment for segment, _, _ in order.slices(0, 0, 0, 300)]
    assert Counter(sequence) == dict.fromkeys(range(100), 3)
    passes = [sequence[start : start + 100] for start in (0, 100, 200)]
    assert all(len(set(each)) < 100 for each in passes)
    assert sum(a == b for a, b in itertools.pairwise(sequence)) < 15


def test_with_weights_too_a_batch_is_a_function_of_its_step_for_any_split_of_the_lanes() -> None:
    segments = make()
    sizes, weights = [len(segment) for segment in segments], [(0.1, 0.7, 1.0, 2.3)[i % 4] for i in range(40)]
    expected = {}
    order = LaneOrder(sizes, 3, 6, 10, weights)
    steps = list(range(order.epoch(5).first_step))
    assert len({order.epoch(number).stretch for number in range(5)}) > 1
    with reader(segments, order, range(6)) as r:
        expected = {step: r.batch(step) for step in steps}
    random.Random(0).shuffle(steps)
    readers = [reader(segments, LaneOrder(sizes, 3, 6, 10, weights), lanes) for lanes in (range(2), range(2, 6))]
    for step in steps:
        for got, want in zip(zip(*(r.batch(step) for r in readers), strict=True), expected[step], strict=True):
            assert np.array_equal(np.concatenate(got, axis=1), want)
    for r in readers:
        r.close()


def test_an_epoch_without_a_window_is_passed_over() -> None:
    order = LaneOrder([1000], seed=0, lanes=10, sequence_length=8, weights=[0.25])
    assert [order.epoch(number).steps for number in range(8)] == [0, 0, 0, 13] * 2
    assert order.window_of(0) == (3, 0, 8)
    assert order.window_of(12) == (3, 96, 100)
    assert order.window_of(13) == (7, 0, 8)
    with reader([np.arange(1000)], order, range(10)) as r:
        assert [len(r.batch(step)[0]) for step in range(12, 14)] == [4, 8]
    short = LaneOrder([1000, 30], seed=0, lanes=10, sequence_length=8, weights=[0.25, 1.0])
    assert [short.epoch(number).stretch for number in range(4)] == [3, 3, 3, 103]
    with reader([np.arange(1000), np.arange(30)], short, range(10)) as r:
        assert [len(r.batch(step)[0]) for step in range(5)] == [3, 3, 3, 8, 8]


def test_too_few_tokens_by_weight_are_reported() -> None:
    with pytest.raises(UserError, match=r"has 62 training tokens in an epoch, by the weights of the sources: too few"):
        LaneOrder([500, 500], seed=0, lanes=2, sequence_length=32, weights=[0.0625, 0.0625])


def test_the_weights_of_segments_are_those_of_their_sources() -> None:
    corpus = CorpusConfig.model_validate(
        {"sources": ["a"], "source": [{"path": "b", "weight": 2.0}, {"path": "c", "weight": 0.25}]}
    )
    shards = [
        Shard(name="", split=split, source=source, counts=Counts(), lengths=[], file_bytes=0, digest="", segments=sizes)
        for split, source, sizes in [("train", 0, [5]), ("train", 2, [5, 6]), ("heldout", 1, [7]), ("train", 1, [8])]
    ]
    dataset = Dataset("none", Manifest.model_construct(corpus=corpus, shards=shards))
    assert dataset.segment_weights("train") == [1.0, 0.25, 0.25, 2.0]
    assert dataset.segment_weights("heldout") == [1.0]
