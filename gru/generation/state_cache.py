"""A cache of hidden states that streams resume from without reading again: those of sessions and of prompt prefixes.

A cache belongs to one engine, and so to one model; the owner is part of each key. L layers, H state.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from gru.generation.sampling import SavedHistory


class CachedState(NamedTuple):
    """A hidden state with what is needed to resume from it."""

    state_L1H: Tensor
    unread_token: int | None = None
    """Newest token of a text, which the state has not read yet; None for a prompt prefix."""
    tokens: int = 0
    """Number of tokens that led to the state, the unread one included."""
    position: int = 0
    """Number of those tokens that were generated."""
    history: SavedHistory | None = None
    """Those tokens, for penalties."""
    stopped: bool = False
    """Whether the text ended with a stop string, which led to the state, too."""
    held: bytes = b""
    """Text that the request has held back."""

    @property
    def nbytes(self) -> int:
        return self.state_L1H.nbytes + (self.history.nbytes if self.history else 0) + len(self.held)


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

    def peek(self, key: bytes) -> CachedState | None:
        """Return the state of this key, or None; for any thread, since it leaves the order of use as it is."""
        return self._states.get(key)

    def put(self, key: bytes, state: CachedState) -> None:
        """Store the state, its tensor copied, and remove the least recently used ones that no longer fit."""
        if state.nbytes > self.max_bytes:
            return
        if (old := self._states.pop(key, None)) is not None:
            self.bytes -= old.nbytes
        self._states[key] = state._replace(state_L1H=state.state_L1H.clone())
        self.bytes += state.nbytes
        while self.bytes > self.max_bytes:
            self.bytes -= self._states.popitem(last=False)[1].nbytes


def session_key(owner: str, session: str) -> bytes:
    """Return the key of the state of an owner's session."""
    return _digest(b"session", _digest(owner.encode()), session.encode())


def turn_key(owner: str, name: str) -> bytes:
    """Return the key of the state after a turn of an owner's conversation."""
    return _digest(b"turn", _digest(owner.encode()), name.encode())


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
