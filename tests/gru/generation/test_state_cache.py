import torch

from gru.generation.sampling import History
from gru.generation.state_cache import CachedState, StateCache, prefix_keys, session_key

STATE = torch.zeros(2, 1, 16)  # 128 bytes


def test_the_least_recently_used_states_are_removed_and_bytes_are_bounded() -> None:
    cache = StateCache(3 * STATE.nbytes)
    for key in (b"a", b"b", b"c"):
        cache.put(key, CachedState(STATE))
    assert cache.get(b"a") is not None
    cache.put(b"d", CachedState(STATE))
    assert [key in cache for key in (b"a", b"b", b"c", b"d")] == [True, False, True, True]
    assert cache.bytes == 3 * STATE.nbytes and len(cache) == 3
    cache.put(b"a", CachedState(STATE, unread_token=7, tokens=9))
    assert cache.bytes == 3 * STATE.nbytes
    cached = cache.get(b"a")
    assert cached is not None and (cached.unread_token, cached.tokens) == (7, 9)
    cache.put(b"huge", CachedState(torch.zeros(2, 1, 1000)))
    assert b"huge" not in cache and len(cache) == 3


def test_a_cached_state_is_a_copy() -> None:
    cache = StateCache(1000)
    state = torch.zeros(1, 1, 4)
    cache.put(b"a", CachedState(state))
    state += 1
    cached = cache.get(b"a")
    assert cached is not None and not cached.state_L1H.any()


def test_keys_differ_by_owner_session_and_prefix() -> None:
    sessions = {session_key(owner, session) for owner in ("", "a", "ab") for session in ("", "b", "bc", "c")}
    assert len(sessions) == 12
    tokens = list(range(200))
    keys = prefix_keys("a", tokens, 64)
    assert len(keys) == len(set(keys)) == 3
    assert prefix_keys("a", tokens[:193], 64) == keys and prefix_keys("a", tokens[:192], 64) == keys[:2]
    assert prefix_keys("a", [*tokens[:100], 0, *tokens[101:]], 64)[0] == keys[0]
    assert prefix_keys("a", [*tokens[:100], 0, *tokens[101:]], 64)[1:] != keys[1:]
    assert not {*prefix_keys("b", tokens, 64)} & {*keys}


def test_a_history_counts_as_bytes_of_its_state() -> None:
    cache = StateCache(2 * STATE.nbytes + 16)
    history = History([1] * 100_000, vocab_size=50_000)
    history.add(7)
    state = CachedState(STATE, history=history.save())
    assert state.nbytes == STATE.nbytes + 2 * 8  # of the tokens that were seen, each once
    assert state._replace(held=b"abc").nbytes == state.nbytes + 3
    cache.put(b"a", state)
    cache.put(b"b", CachedState(STATE))
    assert cache.bytes == cache.max_bytes and len(cache) == 2
    cache.put(b"c", CachedState(STATE))
    assert cache.bytes == 2 * STATE.nbytes and b"a" not in cache
