"""A cache of hidden states that streams resume from without reading again: those of sessions and of prompt prefixes.

A cache belongs to one engine, and so to one model; the owner is part of each key. L layers, H state.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor


class CachedState(NamedTuple):
    """A hidden state with what is needed to resume from it."""

    state_L1H: Tensor
    unread_token: int | None
    """Newest token of a text, which the state has not read yet; None for a prompt prefix."""
    tokens: int
    """Number of tokens that led to the state, the unread one included."""


class StateCache:
    """An LRU cache of at most `max_bytes` of states, for use by one thread."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._states: OrderedDict[bytes, CachedState] = OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._states)

    def __contains__(self, key: bytes) -> bool:
        return key in self._states

    def get(self, key: bytes) -> CachedState | None:
        """Return the state of this key, now the most recently used, or None."""
        if key in self._states:
            self._states.move_to_end(key)
        return self._states.get(key)

    def put(self, key: bytes, state_L1H: Tensor, unread_token: int | None = None, tokens: int = 0) -> None:
        """Store a copy of the state, and remove the least recently used ones that no longer fit."""
        if state_L1H.nbytes > self.max_bytes:
            return
        if (old := self._states.pop(key, None)) is not None:
            self.bytes -= old.state_L1H.nbytes
        self._states[key] = CachedState(state_L1H.clone(), unread_token, tokens)
        self.bytes += state_L1H.nbytes
        while self.bytes > self.max_bytes:
            self.bytes -= self._states.popitem(last=False)[1].state_L1H.nbytes


def session_key(owner: str, session: str) -> bytes:
    """Return the key of the state of an owner's session."""
    return _digest(b"session", _digest(owner.encode()), session.encode())


def prefix_keys(owner: str, tokens: Sequence[int], chunk: int) -> list[bytes]:
    """Return a key for each prefix of the tokens that consists of whole chunks and leaves at least one token unread."""
    key, keys = _digest(b"prefix", owner.encode()), []
    data = np.asarray(tokens, np.uint32).tobytes()
    for end in range(chunk, len(tokens), chunk):
        key = _digest(key, data[4 * (end - chunk) : 4 * end])
        keys.append(key)
    return keys


def _digest(*parts: bytes) -> bytes:
    return hashlib.blake2b(b"".join(parts), digest_size=16).digest()
