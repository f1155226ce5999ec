import random

import numpy as np
import pytest

from gru.corpus import duplicates


def split(values: np.ndarray, sizes: list[int]) -> list[np.ndarray]:
    return np.split(values, np.cumsum(sizes)[:-1])


@pytest.mark.parametrize("sorted_documents", [1 << 24, 50, 7])
def test_every_document_but_the_first_of_equals_is_found_in_whatever_partitions(
    monkeypatch: pytest.MonkeyPatch, sorted_documents: int
) -> None:
    monkeypatch.setattr(duplicates, "_SORTED_DOCUMENTS", sorted_documents)
    rng = random.Random(0)
    names = [rng.getrandbits(64) for _ in range(60)]
    documents = np.array(rng.choices(names, k=200), dtype=np.uint64)
    expected = [name in documents[:i] for i, name in enumerate(documents)]
    for sizes in ([200], [0, 100, 0, 0, 100, 0], [1] * 200, [3, 90, 7, 100]):
        parts = split(documents, sizes)
        masks = duplicates.find_equal(
            sizes, lambda index, parts=parts: {i: p for i, p in enumerate(parts) if len(p)}[index]
        )
        found = np.concatenate([masks.get(i, np.zeros(size, dtype=bool)) for i, size in enumerate(sizes)])
        assert found.tolist() == expected
        assert all(mask.any() for mask in masks.values())
    assert duplicates.find_equal([], {}.__getitem__) == {}
    assert duplicates.find_equal([0, 0], {}.__getitem__) == {}


def similar(
    texts: list[str], sizes: list[int], similarity: float, equal: dict[int, np.ndarray] | None = None
) -> list[bool]:
    parts = split(np.stack([duplicates.signature(text) for text in texts]), sizes)
    masks = duplicates.find_similar(sizes, parts.__getitem__, equal or {}, similarity)
    return np.concatenate([masks.get(i, np.zeros(size, dtype=bool)) for i, size in enumerate(sizes)]).tolist()


def test_documents_that_share_most_of_their_text_are_near_duplicates() -> None:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=6)) for _ in range(1000)]
    first, other = " ".join(words[:300]), " ".join(words[300:600])
    changed = first.replace(words[100], "something")
    half = " ".join(words[:150] + words[600:750])
    texts = [first, other, changed, half, "短", "短詩", other[:-20], ""]
    for sizes in ([8], [2, 2, 4], [0, 8, 0]):
        assert similar(texts, sizes, 0.8) == [False, False, True, False, False, False, True, False]
    assert similar(texts, [8], 0.2) == [False, False, True, True, False, False, True, False]
    assert similar([first, half, first], [3], 0.99) == [False, False, True]
    gone = {0: np.array([True] + [False] * 7)}  # what is left out already is like nothing
    assert similar(texts, [8], 0.8, gone) == [False] * 6 + [True, False]


def test_signatures_are_the_same_for_ever() -> None:
    # Written down: a change of these numbers changes which documents a corpus keeps.
    values = duplicates.signature("白日依山盡，黃河入海流。")
    assert values.shape == (128,)
    assert values[:3].tolist() == [2262523614, 956004467, 195150007]
