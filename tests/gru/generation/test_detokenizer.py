import random

import pytest

from gru.generation.detokenizer import Detokenizer

BYTES = [bytes([b]) for b in range(256)]


def pieces(data: bytes, stops: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    stream = Detokenizer(BYTES, stops)
    out = []
    for byte in data:
        out.append(stream.feed(byte))
        if stream.stopped:
            break
    out.append(stream.finish())
    return out, stream.stopped


@pytest.mark.parametrize("text", ["plain", "naïve 白日依山盡 👩‍👩‍👧", "\u2028\x00"])
def test_bytes_join_to_characters(text: str) -> None:
    out, _ = pieces(text.encode())
    assert "".join(out) == text
    assert all("\ufffd" not in piece for piece in out)


def test_invalid_bytes_are_replaced() -> None:
    assert "".join(pieces(b"a\xffb\xe7\x99")[0]) == "a\ufffdb\ufffd"


def test_stop_string_across_tokens_is_not_shown() -> None:
    assert pieces(b"one\n\ntwo", ("\n\n",)) == (["o", "n", "e", "", "", ""], True)


def test_a_prefix_of_a_stop_string_is_released_if_it_goes_no_further() -> None:
    out, stopped = pieces(b"aab ab aa", ("aac",))
    assert ("".join(out), stopped) == ("aab ab aa", False)


def test_stop_string_may_overlap_itself() -> None:
    assert "".join(pieces(b"ababac!", ("abac",))[0]) == "ab"


def test_the_end_does_not_depend_on_where_tokens_are_cut() -> None:
    text, stops = "xxabcabd日本語end", ["abd日", "bca", "d日本"]
    whole = Detokenizer([text.encode()], stops)
    expected = whole.feed(0) + whole.finish()
    assert whole.stopped and expected == "xxa"
    generator = random.Random(0)
    for _ in range(100):
        data, tokens = text.encode(), []
        while data:
            n = generator.randint(1, 5)
            tokens.append(data[:n])
            data = data[n:]
        stream = Detokenizer(tokens, stops)
        assert "".join(stream.feed(i) for i in range(len(tokens))) + stream.finish() == expected
        assert stream.stopped
