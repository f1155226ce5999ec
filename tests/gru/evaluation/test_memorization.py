import random
import tracemalloc
from collections.abc import Iterator

import pytest

from gru.evaluation import memorization
from gru.evaluation.memorization import SPAN_LENGTH, copied_share, copied_spans, repetition, spans

ALPHABET = "abcdefgh 白日依山盡，😀\n"


def text(seed: int, length: int) -> str:
    return "".join(random.Random(seed).choices(ALPHABET, k=length))


def share(texts: list[str], others: list[str]) -> float | None:
    return copied_share(texts, copied_spans(texts, iter(others)))


def test_copied_text_is_found_at_any_position() -> None:
    others = [text(i, 10 * i) for i in range(100)]
    assert share([others[80][:50], others[60][-SPAN_LENGTH:], others[4]], others) == 1.0
    assert share([text(1000, 500), text(1001, SPAN_LENGTH)], others) == 0.0
    assert share([others[70][100:200] + text(1000, 131)], others) == pytest.approx(69 / 200, abs=0.01)


def test_a_span_across_two_texts_is_not_copied() -> None:
    one, other = text(1, 40), text(2, 40)
    assert copied_spans([one[-20:] + other[:20]], [one, other]) == set()


def test_a_text_shorter_than_a_span_has_none() -> None:
    assert share([text(1, SPAN_LENGTH - 1), ""], [text(1, 100)]) is None
    assert share([text(1, SPAN_LENGTH - 1), text(2, SPAN_LENGTH)], [text(1, 100), ""]) == 0.0
    assert share([text(1, SPAN_LENGTH)], []) == 0.0


def test_a_span_across_two_chunks_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    long = text(1, 5000)
    for size in (64, 100, 333):
        monkeypatch.setattr(memorization, "_CHUNK_CHARACTERS", size)
        assert share([long], ["short", long[:3000], long[2969:], "", text(2, 40)]) == 1.0


def test_memory_does_not_grow_with_the_searched_text() -> None:
    def others() -> Iterator[str]:
        for seed in range(20):
            yield text(seed, 40) * 50_000

    tracemalloc.start()
    try:
        assert copied_spans([text(19, 40)], others()) == set(spans(text(19, 40)))
        assert tracemalloc.get_traced_memory()[1] < 100e6  # of 160 MB of text
    finally:
        tracemalloc.stop()


def test_a_loop_is_repetition_and_distinct_tokens_are_not() -> None:
    assert repetition([[1, 2, 3] * 100]) == pytest.approx(294 / 297)
    assert repetition([list(range(100))]) == 0.0
    assert repetition([[1, 2, 3] * 100, list(range(100)), [7]]) == pytest.approx(147 / 297)
    assert repetition([[1, 2, 3], []]) is None
