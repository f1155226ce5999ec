"""How the engine shares its slots: prompts, limits, deadlines, failures, the end."""

import itertools
import math
import time

import pytest

from gru.generation import engine as engines
from gru.generation.engine import Closed, Engine, Expired, Overloaded
from gru.generation.request import Request
from gru.generation.sampling import SamplingParams
from gru.model.language_model import GRULanguageModel
from tests.gru.generation.helpers import END, Recorder, SlowModel, run


def test_a_long_prompt_does_not_stall_others(model: GRULanguageModel) -> None:
    slow = SlowModel(model)
    engine = Engine(slow, END, slots=4, max_queue=4)
    first, second = Recorder(), Recorder()
    engine.submit(Request([1], SamplingParams(0, temperature=0), 10_000, first))
    while not first.tokens:
        time.sleep(0.001)
    slow.shapes.clear()
    stream = engine.submit(Request([1] * (20 * engines.CHUNK), SamplingParams(1), 1, second))
    second.wait()
    engine.close(drain=False)
    reads = [i for i, shape in enumerate(slow.shapes) if shape[1] == 1]
    assert len(reads) == 21 and stream.read == 20 * engines.CHUNK + 1
    assert max(slow.shapes[i][0] for i in reads) == engines.CHUNK
    assert all(later - earlier == 2 for earlier, later in itertools.pairwise(reads))


def test_a_long_prompt_does_not_stall_other_prompts(model: GRULanguageModel) -> None:
    slow = SlowModel(model)
    engine = Engine(slow, END, slots=4, max_queue=4)
    slow.pause = 0.002
    long, short = Recorder(), Recorder()
    stream = engine.submit(Request([1] * (1000 * engines.CHUNK), SamplingParams(1), 1, long))
    while not stream.read:
        time.sleep(0.001)
    before = stream.read
    engine.submit(Request([1] * 10, SamplingParams(1), 1, short))
    short.wait()
    assert stream.read - before <= 4 * engines.CHUNK
    engine.close(drain=False)
    assert engine.join(10)


def test_short_prompts_are_read_between_the_same_two_steps(model: GRULanguageModel) -> None:
    slow = SlowModel(model)
    engine = Engine(slow, END, slots=8, max_queue=8)
    slow.pause = 0.02
    blocker, recorders = Recorder(), [Recorder() for _ in range(5)]
    engine.submit(Request([1], SamplingParams(0, temperature=0), 100_000, blocker))
    while not blocker.tokens:
        time.sleep(0.001)
    for recorder in recorders:
        engine.submit(Request([1] * 9, SamplingParams(1), 1, recorder))
    for recorder in recorders:
        recorder.wait()
    assert len(blocker.tokens) < 6, "a step for each of them"
    engine.close(drain=False)


def test_a_full_queue_refuses_and_a_cancelled_request_makes_room(model: GRULanguageModel) -> None:
    slow = SlowModel(model)
    engine = Engine(slow, END, slots=1, max_queue=2)
    slow.pause = 0.01
    recorders = [Recorder() for _ in range(4)]
    params = SamplingParams(0, temperature=0)
    streams = [engine.submit(Request([1], params, 100_000, recorder)) for recorder in recorders[:3]]
    with pytest.raises(Overloaded):
        engine.submit(Request([1], SamplingParams(0), 1, recorders[3]))
    while not recorders[0].notified:
        time.sleep(0.001)
    assert (engine.active, engine.waiting) == (1, 2)
    engine.cancel(streams[1])  # in the queue
    assert engine.waiting == 1
    engine.cancel(streams[0])  # in a slot
    while not recorders[2].notified:
        time.sleep(0.001)
    assert (engine.active, engine.waiting) == (1, 0)
    engine.submit(Request([1], SamplingParams(0), 1, recorders[3]))
    engine.cancel(streams[2])
    assert recorders[3].wait().tokens
    assert recorders[0].end is recorders[1].end is recorders[2].end is None
    engine.close()
    assert engine.join(10)


def test_tokens_in_flight_are_counted_exactly(model: GRULanguageModel) -> None:
    slow = SlowModel(model)
    engine = Engine(slow, END, slots=2, max_queue=8, max_tokens=1000)
    slow.pause = 0.002
    first, second, third = (Recorder() for _ in range(3))
    stream = engine.submit(Request([1] * 100, SamplingParams(0, temperature=0), 500, first))
    with pytest.raises(Overloaded, match="in flight"):
        engine.submit(Request([1], SamplingParams(0), 400, third))
    engine.submit(Request([1], SamplingParams(0), 399, second))
    assert engine.tokens_in_flight == 1000
    engine.cancel(stream)
    while engine.tokens_in_flight > 400:
        time.sleep(0.001)
    engine.submit(Request([1], SamplingParams(0), 599, third))
    engine.close(drain=False)
    assert engine.join(10) and engine.tokens_in_flight == 0


def test_a_deadline_ends_a_request_wherever_it_is(model: GRULanguageModel) -> None:
    slow = SlowModel(model)
    engine = Engine(slow, END, slots=2, max_queue=8)
    slow.pause = 0.005
    deadline = time.monotonic() + 0.3
    prompts = [1], [1] * 1_000_000, [1]  # in a row; being read; in the queue
    recorders = [Recorder() for _ in prompts]
    for prompt, recorder in zip(prompts, recorders, strict=True):
        request = Request(prompt, SamplingParams(0, temperature=0), 10**9, recorder, deadline=deadline)
        engine.submit(request)
    assert all(isinstance(recorder.wait().end, Expired) for recorder in recorders)
    assert recorders[0].tokens and not recorders[1].tokens and engine.active + engine.waiting == 0
    before = recorders[0].tokens
    assert run(engine, [([1], SamplingParams(0, temperature=0), len(before))]) == [before]
    engine.close()


def test_an_error_in_the_model_reaches_every_request(model: GRULanguageModel) -> None:
    slow = SlowModel(model)
    engine = Engine(slow, END, slots=2, max_queue=8)
    slow.pause = 0.005
    recorders = [Recorder() for _ in range(5)]
    for recorder in recorders:
        engine.submit(Request([1], SamplingParams(0, temperature=0), 100_000, recorder))
    slow.failing = True
    for recorder in recorders:
        assert isinstance(recorder.wait().end, RuntimeError) and "out of luck" in str(recorder.end)
    assert engine.join(10) and engine.heartbeat == -math.inf
    with pytest.raises(Closed):
        engine.submit(Request([1], SamplingParams(0), 1, Recorder()))


@pytest.mark.parametrize("method", ["token", "notify"])
def test_a_receiver_that_fails_harms_nobody_else(engine: Engine, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> bool:
        raise OSError("gone")

    broken, recorder = Recorder(), Recorder()
    monkeypatch.setattr(broken, method, fail)
    engine.submit(Request([1], SamplingParams(0, temperature=0), 10_000, broken))
    engine.submit(Request([2], SamplingParams(0, temperature=0), 50, recorder))
    assert recorder.wait().end == "length" and len(recorder.tokens) == 50
    assert engine.active == 0 and broken.end is None


def test_closing_drains_or_aborts(model: GRULanguageModel) -> None:
    engine = Engine(model, END, slots=2, max_queue=8)
    recorders = [Recorder() for _ in range(5)]
    for recorder in recorders:
        engine.submit(Request([1], SamplingParams(0, temperature=0), 40, recorder))
    engine.close(drain=True)
    with pytest.raises(Closed):
        engine.submit(Request([1], SamplingParams(0), 1, Recorder()))
    assert [recorder.wait().end for recorder in recorders] == ["length"] * 5
    assert engine.join(10)
    engine = Engine(model, END, slots=2, max_queue=8)
    recorder = Recorder()
    engine.submit(Request([1], SamplingParams(0, temperature=0), 10**9, recorder))
    engine.close(drain=False)
    assert isinstance(recorder.wait().end, Closed) and engine.join(10)


def test_an_idle_engine_sleeps_and_is_healthy(engine: Engine) -> None:
    run(engine, [([1], SamplingParams(0), 5)])
    time.sleep(0.05)
    assert engine.heartbeat == math.inf
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1
