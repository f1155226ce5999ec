"""States that a stream can go on from without reading again what led to them: of sessions, of beginnings of prompts.

They belong to one engine, and so to one model; an owner is part of each key. L layers, H state.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor


class Saved(NamedTuple):
    state_L1H: Tensor
    last: int | None
    """A token that the state has not read yet: the newest one of a text."""
    tokens: int
    """How many led to it, that one included."""


class StateCache:
    """Keeps no more than so many bytes of states; the least recently used are forgotten. For one thread."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self._saved: OrderedDict[bytes, Saved] = OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._saved)

    def __contains__(self, key: bytes) -> bool:
        return key in self._saved

    def get(self, key: bytes) -> Saved | None:
        if key in self._saved:
            self._saved.move_to_end(key)
        return self._saved.get(key)

    def put(self, key: bytes, state_L1H: Tensor, last: int | None = None, tokens: int = 0) -> None:
        """Keep a copy of a state."""
        if state_L1H.nbytes > self.most_bytes:
            return
        if (old := self._saved.pop(key, None)) is not None:
            self.bytes -= old.state_L1H.nbytes
        self._saved[key] = Saved(state_L1H.clone(), last, tokens)
        self.bytes += state_L1H.nbytes
        while self.bytes > self.most_bytes:
            self.bytes -= self._saved.popitem(last=False)[1].state_L1H.nbytes


def session_key(owner: str, session: str) -> bytes:
    return _digest(b"session", _digest(owner.encode()), session.encode())


def prefix_keys(owner: str, tokens: Sequence[int], chunk: int) -> list[bytes]:
    """A key for each beginning of the tokens that is a number of whole chunks and leaves at least one token."""
    key, keys = _digest(b"prefix", owner.encode()), []
    data = np.asarray(tokens, np.uint32).tobytes()
    for end in range(chunk, len(tokens), chunk):
        key = _digest(key, data[4 * (end - chunk) : 4 * end])
        keys.append(key)
    return keys


def _digest(*parts: bytes) -> bytes:
    return hashlib.blake2b(b"".join(parts), digest_size=16).digest()
