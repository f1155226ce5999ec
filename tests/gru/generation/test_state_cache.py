import torch

from gru.generation.state_cache import StateCache, prefix_keys, session_key

STATE = torch.zeros(2, 1, 16)  # 128 bytes


def test_the_least_recently_used_states_are_removed_and_bytes_are_bounded() -> None:
    cache = StateCache(3 * STATE.nbytes)
    for key in (b"a", b"b", b"c"):
        cache.put(key, STATE)
    assert cache.get(b"a") is not None
    cache.put(b"d", STATE)
    assert [key in cache for key in (b"a", b"b", b"c", b"d")] == [True, False, True, True]
    assert cache.bytes == 3 * STATE.nbytes and len(cache) == 3
    cache.put(b"a", STATE, unread_token=7, tokens=9)
    assert cache.bytes == 3 * STATE.nbytes
    cached = cache.get(b"a")
    assert cached is not None and (cached.unread_token, cached.tokens) == (7, 9)
    cache.put(b"huge", torch.zeros(2, 1, 1000))
    assert b"huge" not in cache and len(cache) == 3


def test_a_cached_state_is_a_copy() -> None:
    cache = StateCache(1000)
    state = torch.zeros(1, 1, 4)
    cache.put(b"a", state)
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
