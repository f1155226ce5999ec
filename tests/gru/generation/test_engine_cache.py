"""Sessions and prompt prefixes that the engine resumes from cached states."""

import time

import numpy as np

from gru.generation import engine as engines
from gru.generation.engine import Engine
from gru.generation.request import Request
from gru.generation.sampling import SamplingParams
from gru.model.language_model import GRULanguageModel
from tests.gru.generation.helpers import END, VOCAB, Recorder, SlowModel, run


def test_a_session_resumes_as_if_it_had_been_one_text(model: GRULanguageModel) -> None:
    engine = Engine(model, END, slots=4, max_queue=8, cache_bytes=1 << 20)
    greedy = SamplingParams(0, temperature=0)
    [whole] = run(engine, [([7, 8], greedy, 30)])
    first, second = Recorder(), Recorder()
    one = engine.submit(Request([7, 8], greedy, 12, first, session="s", owner="a"))
    first.wait()
    two = engine.submit(Request([], greedy, 18, second, session="s", owner="a"))
    assert first.tokens + second.wait().tokens == whole
    assert (one.resumed, two.resumed) == (0, 14)
    other = Recorder()
    engine.submit(
        Request([7, 8], greedy, 12, other, session="s", owner="b")
    )  # another owner's session of the same name
    assert other.wait().tokens == whole[:12]
    engine.close()


def test_a_cancelled_request_does_not_change_its_session(model: GRULanguageModel) -> None:
    slow = SlowModel(model)
    engine = Engine(slow, END, slots=4, max_queue=8, cache_bytes=1 << 20)
    greedy = SamplingParams(0, temperature=0)
    [whole] = run(engine, [([7, 8], greedy, 30)])
    first, cancelled, second = Recorder(), Recorder(), Recorder()
    engine.submit(Request([7, 8], greedy, 12, first, session="s"))
    first.wait()
    slow.pause = 0.01
    stream = engine.submit(Request([], greedy, 10_000, cancelled, session="s"))
    while len(cancelled.tokens) < 5:
        time.sleep(0.001)
    engine.cancel(stream)
    slow.pause = 0
    while engine.active:
        time.sleep(0.001)
    engine.submit(Request([], greedy, 18, second, session="s"))
    assert first.tokens + second.wait().tokens == whole
    engine.close()


def test_shared_prompt_prefixes_are_read_once_and_change_no_text(model: GRULanguageModel) -> None:
    slow = SlowModel(model)
    engine = Engine(slow, END, slots=4, max_queue=8, cache_bytes=1 << 20)
    plain = Engine(model, END, slots=4, max_queue=8)
    shared = np.random.default_rng(0).integers(1, VOCAB, 5 * engines.CHUNK).tolist()
    requests = [([*shared, i], SamplingParams(i), 20) for i in range(4)]
    expected = run(plain, requests)
    assert run(engine, requests[:1]) == expected[:1]
    for request, text in zip(requests[1:], expected[1:], strict=True):
        slow.shapes.clear()
        recorder = Recorder()
        stream = engine.submit(Request(*request, recorder))
        assert recorder.wait().tokens == text
        assert stream.cached == 5 * engines.CHUNK
        assert sum(shape[0] for shape in slow.shapes if shape[1] == 1) == 2
    other = Recorder()
    stranger = engine.submit(Request(*requests[0], other, owner="someone else"))
    assert other.wait().tokens == expected[0] and stranger.cached == 0
    engine.close()
    plain.close()
