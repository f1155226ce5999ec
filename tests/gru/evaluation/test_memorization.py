import random
import tracemalloc
from collections.abc import Iterator

import pytest

from gru.evaluation import memorization
from gru.evaluation.memorization import SPAN, copied_share, copied_spans, repetition, spans

ALPHABET = "abcdefgh 白日依山盡，😀\n"


def text(seed: int, length: int) -> str:
    return "".join(random.Random(seed).choices(ALPHABET, k=length))


def share(texts: list[str], others: list[str]) -> float | None:
    return copied_share(texts, copied_spans(texts, iter(others)))


def test_copied_text_is_found_wherever_it_stands() -> None:
    others = [text(i, 10 * i) for i in range(100)]
    assert share([others[80][:50], others[60][-SPAN:], others[4]], others) == 1.0
    assert share([text(1000, 500), text(1001, SPAN)], others) == 0.0
    assert share([others[70][100:200] + text(1000, 131)], others) == pytest.approx(69 / 200, abs=0.01)


def test_a_span_over_two_texts_is_not_copied() -> None:
    one, other = text(1, 40), text(2, 40)
    assert copied_spans([one[-20:] + other[:20]], [one, other]) == set()


def test_a_text_shorter_than_a_span_has_none() -> None:
    assert share([text(1, SPAN - 1), ""], [text(1, 100)]) is None
    assert share([text(1, SPAN - 1), text(2, SPAN)], [text(1, 100), ""]) == 0.0
    assert share([text(1, SPAN)], []) == 0.0


def test_long_texts_are_searched_in_pieces_and_no_border_hides_a_span(monkeypatch: pytest.MonkeyPatch) -> None:
    long = text(1, 5000)
    for piece in (64, 100, 333):
        monkeypatch.setattr(memorization, "_PIECE", piece)
        assert share([long], ["short", long[:3000], long[2969:], "", text(2, 40)]) == 1.0


def test_memory_does_not_grow_with_the_others() -> None:
    def others() -> Iterator[str]:
        for seed in range(20):
            yield text(seed, 40) * 50_000

    tracemalloc.start()
    try:
        assert copied_spans([text(19, 40)], others()) == set(spans(text(19, 40)))
        assert tracemalloc.get_traced_memory()[1] < 100e6  # of 160 MB of text
    finally:
        tracemalloc.stop()


def test_a_loop_repeats_itself_and_plain_text_does_not() -> None:
    assert repetition([[1, 2, 3] * 100]) == pytest.approx(294 / 297)
    assert repetition([list(range(100))]) == 0.0
    assert repetition([[1, 2, 3] * 100, list(range(100)), [7]]) == pytest.approx(147 / 297)
    assert repetition([[1, 2, 3], []]) is None
