"""Incremental detokenization: token ids to pieces of text. It knows bytes and stop strings, but no model."""

import codecs
from collections.abc import Sequence


class Detokenizer:
    """Turns one stream's tokens into text that later tokens cannot change.

    An incomplete character is held back, and so is text that may be the beginning of a stop string. The text ends
    before the stop string that is complete first; from then on `stopped` is true. In the text of the first `min_tokens`
    tokens no stop string is looked for. `decoded` counts the characters that the tokens have completed, `released`
    those that were returned.
    """

    def __init__(self, token_bytes: Sequence[bytes], stops: Sequence[str] = (), min_tokens: int = 0) -> None:
        assert all(stops), "an empty stop string would end every text at once"
        self.stopped = False
        self.decoded = self.released = 0
        self._token_bytes = token_bytes
        self._stops = stops
        self._min_tokens, self._tokens = min_tokens, 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def feed(self, token: int) -> str:
        """Return the text that this token completes, which may be empty."""
        self._tokens += 1
        return self._release(self._decoder.decode(self._token_bytes[token]))

    def resume(self, held: bytes) -> None:
        """Begin with text that an earlier part of the stream has held back."""
        self._held = self._decoder.decode(held)
        self.decoded = len(self._held)

    def hold(self) -> bytes:
        """Return the text held back so far, for a later part of the stream."""
        return self._held.encode() + self._decoder.getstate()[0]

    def finish(self) -> str:
        """Return the text held back, at the end of the stream. Bytes that form no character become U+FFFD."""
        text = self._release(self._decoder.decode(b"", final=True)) + self._held
        self.released += len(self._held)
        self._held = ""
        return text

    def _release(self, new: str) -> str:
        if self.stopped or not new:
            return ""
        self.decoded += len(new)
        text = self._held + new
        stops = self._stops if self._tokens > self._min_tokens else ()
        matches = [(start + len(stop), start) for stop in stops if (start := text.find(stop)) >= 0]
        if matches:
            self.stopped, end = True, min(matches)[1]
        else:
            end = len(text) - max((overlap(text, stop) for stop in stops), default=0)
        self._held = "" if self.stopped else text[end:]
        self.released += end
        return text[:end]


def overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of `text` that is a proper prefix of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
