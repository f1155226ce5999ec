import random
from pathlib import Path

import pytest

from gru.corpus.text_cuts import LONGEST_LINE
from tests.gru.corpus.reading import texts, write

RNG = random.Random(0)
LONG_LINES = {
    "words": " ".join(f"{RNG.getrandbits(40):x}" for _ in range(25_000)),
    "characters": "黃河入海流😀" * 14_000,
    "one word": "x" * 250_000,
    "mixed": "short\n" * 999 + "黃河 " * 40_000 + "\n" + "y" * 70_000 + "\nend\n" + "z" * 90_000,
}


@pytest.mark.parametrize("name", LONG_LINES)
def test_plain_text_is_cut_within_long_lines_and_stays_exact(tmp_path: Path, name: str) -> None:
    text = LONG_LINES[name]
    path = write(tmp_path / "a.txt", text.encode())
    for size in (6_007, 40_000, 65_536, 99_999):
        pieces = texts(path, partition_bytes=size)
        assert "".join(pieces) == text
        assert len(pieces) > 1
        assert all(len(piece.encode()) <= size + 2 * LONGEST_LINE for piece in pieces)


def test_a_line_that_is_not_long_is_never_cut(tmp_path: Path) -> None:
    lines = ["word " * (LONGEST_LINE // 5 - 1) + "\n" for _ in range(75)]
    path = write(tmp_path / "a.txt", "".join(lines).encode())
    for size in (999, 70_000):
        pieces = texts(path, partition_bytes=size)
        assert "".join(pieces) == "".join(lines) and all(piece.endswith("\n") for piece in pieces)


def test_a_tail_may_be_a_part_of_a_single_line(tmp_path: Path) -> None:
    text = LONG_LINES["words"]
    path = write(tmp_path / "a.txt", text.encode())
    train, heldout = texts(path, heldout="tail", heldout_share=0.3)
    assert train + heldout == text and 0.29 < len(heldout) / len(text) < 0.31
