"""Sessions and prompt prefixes that the engine resumes from cached states."""

import time

import numpy as np
import torch

from gru.generation import engine as engines
from gru.generation.engine import Engine, StateNotCached
from gru.generation.request import Request, Turn
from gru.generation.sampling import SamplingParams
from gru.model.language_model import GRULanguageModel
from tests.gru.generation.helpers import END, VOCAB, Recorder, SlowModel, make_model, run


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


def test_a_conversation_continues_from_any_of_its_turns(model: GRULanguageModel) -> None:
    engine = Engine(model, END, slots=4, max_queue=8, cache_bytes=1 << 20)

    def say(
        prompt: list[int], previous: str | None, name: str | None, ends: bool = False, owner: str = "a"
    ) -> Recorder:
        params = SamplingParams(0, temperature=0, logit_bias={END: ends}, end_of_text=END)
        recorder = Recorder()
        engine.submit(Request(prompt, params, 12, recorder, owner=owner, turn=Turn(previous, name)))
        return recorder.wait()

    def at_once(prompt: list[int]) -> list[int]:
        return run(engine, [(prompt, SamplingParams(0, temperature=0), 12)])[0]

    first = say([7, 8], None, "1")
    assert first.tokens == at_once([7, 8]) and engine.turn_state("a", "1") and not engine.turn_state("b", "1")
    for prompt in ([9], [10], [9]):  # the state of the first turn stays as it is
        assert say(prompt, "1", "2").tokens == at_once([7, 8, *first.tokens, *prompt])
    assert say([7, 8], None, "ended", ends=1000).tokens == []
    assert say([9], "ended", None).tokens == at_once([7, 8, 9])  # without the end of text in between
    assert isinstance(say([9], "1", None, owner="b").end, StateNotCached)
    assert isinstance(say([9], "no", "no").end, StateNotCached) and not engine.turn_state("a", "no")
    state = engine.turn_state("a", "1")
    assert state and not state.stopped and engine.active == 0
    recorder = Recorder(stop_after=3)
    engine.submit(Request([7], SamplingParams(0), 12, recorder, turn=Turn(None, "stopped")))
    assert recorder.wait().end == "stop" and engine.turn_state("", "stopped").stopped  # type: ignore[union-attr]
    session = Recorder()
    assert engine.submit(Request([7], SamplingParams(0), 12, session, session="1", owner="a")).resumed == 0
    session.wait()
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


def test_min_tokens_count_the_tokens_of_a_request_not_those_of_its_session() -> None:
    model = make_model()
    with torch.no_grad():
        model.output_bias[END] = 100
    engine = Engine(model, END, slots=4, max_queue=8, cache_bytes=1 << 20)
    lengths = []
    for least in (20, 7, 0):
        recorder = Recorder()
        params = SamplingParams(1, min_tokens=least, end_of_text=END)
        engine.submit(Request([5], params, 30, recorder, session="s"))
        lengths.append(len(recorder.wait().tokens))
    assert lengths == [20, 7, 0]
    engine.close()


def test_a_prompt_may_begin_with_the_end_of_text_which_is_read_once(model: GRULanguageModel) -> None:
    engine = Engine(model, END, slots=4, max_queue=8, cache_bytes=1 << 20)
    prompt = np.random.default_rng(0).integers(1, VOCAB, 2 * engines.CHUNK).tolist()
    params = SamplingParams(3)
    [whole] = run(engine, [([END, *prompt], params, 20)])
    recorders = [Recorder(), Recorder(), Recorder()]
    begun = engine.submit(Request([END, *prompt], params, 20, recorders[0]))
    plain = engine.submit(Request(prompt, params, 20, recorders[1]))
    engine.submit(Request([END, *prompt], params, 20, recorders[2], session="s"))
    assert [recorder.wait().tokens for recorder in recorders] == [whole] * 3
    assert (begun.cached_prompt_tokens, plain.cached_prompt_tokens) == (2 * engines.CHUNK, 2 * engines.CHUNK - 1)
    engine.close()
