import itertools
import math
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from gru.config import ModelConfig
from gru.generation import engine as engines
from gru.generation.engine import Closed, Engine, Expired, Overloaded, Request, reproducible_widths
from gru.generation.sampling import Draw, SamplingParams, logprobs, sample
from gru.model.inference import inference_model
from gru.model.language_model import GRULanguageModel

END = 0
VOCAB = 301


class Sink:
    """A receiver that keeps what it is told."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.end: object = None
        self.done = threading.Event()

    def __call__(self, token: int | None, end: object) -> None:
        if token is not None:
            self.tokens.append(token)
        if end is not None:
            self.end = end
            self.done.set()

    def wait(self) -> "Sink":
        assert self.done.wait(60), "the request never ended"
        return self


class Slow(torch.nn.Module):
    """The model, but each call waits to be let through, or fails."""

    def __init__(self, model: GRULanguageModel) -> None:
        super().__init__()
        self.model = model
        self.vocab_size = model.vocab_size
        self.initial_state = model.initial_state
        self.shapes: list[tuple[int, ...]] = []
        self.pause = 0.0
        self.failing = False

    def features(self, tokens: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.shapes.append(tuple(tokens.shape))
        time.sleep(self.pause)
        if self.failing:
            raise RuntimeError("out of luck")
        return self.model.features(tokens, state)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return self.model.logits(x)

    def forward(self, tokens: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, state = self.features(tokens, state)
        return self.logits(x), state


def make_model(embedding: int = 24, hidden: int = 37, layers: int = 2) -> GRULanguageModel:
    torch.manual_seed(0)
    model = GRULanguageModel(ModelConfig(embedding=embedding, hidden=hidden, layers=layers), VOCAB).eval()
    with torch.no_grad():
        model.output_bias[END] = -100  # documents do not end by chance
    return model


@pytest.fixture(scope="module")
def model() -> GRULanguageModel:
    return make_model()


@pytest.fixture
def engine(model: GRULanguageModel) -> Iterator[Engine]:
    engine = Engine(model, END, slots=8, max_queue=100)
    yield engine
    engine.close(drain=False)
    assert engine.join(10)


def prompts(count: int) -> list[list[int]]:
    generator = np.random.default_rng(0)
    lengths = generator.integers(0, 200, count)
    return [generator.integers(1, VOCAB, length).tolist() for length in lengths]


def params(i: int) -> SamplingParams:
    return SamplingParams(i, *[(1.0, 0, 1.0), (0.8, 20, 1.0), (1.2, 0, 0.9), (0.0, 0, 1.0)][i % 4])


def run(engine: Engine, requests: list[tuple[list[int], SamplingParams, int]]) -> list[list[int]]:
    sinks = [Sink() for _ in requests]
    for request, sink in zip(requests, sinks, strict=True):
        engine.submit(Request(*request, sink))
    return [sink.wait().tokens for sink in sinks]


def test_equals_a_plain_loop_over_the_model(model: GRULanguageModel, engine: Engine) -> None:
    for i, prompt in enumerate(prompts(4)):
        expected: list[int] = []
        with torch.inference_mode():
            state = model.initial_state(1)
            read = torch.tensor([END, *prompt]).unsqueeze(1)
            logits, state = model(read, state)
            for position in range(30):
                [token] = sample(logits[-1].numpy(), [Draw(params(i), position)]).tolist()
                if token == END:
                    break
                expected.append(token)
                logits, state = model(torch.tensor([[token]]), state)
        assert run(engine, [(prompt, params(i), 30)]) == [expected]


@pytest.mark.parametrize("shape", [(24, 37, 2), (64, 64, 1), (48, 96, 3)])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_token_depends_on_weights_prompt_seed_and_position_only(
    shape: tuple[int, int, int], compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: logits are compared through what is sampled, hidden states through 60 steps of carrying on."""
    model = inference_model(make_model(*shape)) if compiled else make_model(*shape)
    monkeypatch.setattr(engines, "LARGEST_WIDTH", 8)  # less than the slots
    requests = [(prompt, params(i), 20 + 7 * i % 60) for i, prompt in enumerate(prompts(12))]
    answers = []
    for slots in (1, 5, 12):  # others in the batch, other widths, after a restart
        for order in (1, -1):  # other slots
            engine = Engine(model, END, slots=slots, max_queue=100)
            answers.append(run(engine, requests[::order])[::order])
            engine.close()
            assert engine.join(10)
    for i, request in enumerate(requests[:4]):  # alone
        engine = Engine(model, END, slots=8, max_queue=1)
        assert run(engine, [request]) == [answers[0][i]]
        engine.close()
    assert all(answer == answers[0] for answer in answers)


@pytest.mark.parametrize("shape", [(384, 384, 1), (100, 60, 2), (33, 37, 3)])
def test_states_and_logits_are_the_same_bits_at_every_width(shape: tuple[int, int, int]) -> None:
    """Which widths those are depends on the processor: the small ones of odd shapes differ on some."""
    model = make_model(*shape)
    with torch.inference_mode():
        widths = reproducible_widths(model, 64)
        assert widths[-1] == 64 and set(widths) <= {1, 2, 4, 8, 16, 32, 64}
        tokens = torch.arange(64)[None]
        wanted = model(tokens, model.initial_state(64))
        for width in widths:
            logits, state = model(tokens[:, :width], model.initial_state(width))
            assert torch.equal(logits, wanted[0][:, :width]) and torch.equal(state, wanted[1][:, :width])


def test_widths_that_round_differently_are_not_used(model: GRULanguageModel) -> None:
    class Uneven(Slow):
        def forward(self, tokens: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits, state = super().forward(tokens, state)
            return logits * (1 + 1e-6 * (tokens.shape[1] == 8)), state

    with torch.inference_mode():
        widths = reproducible_widths(Uneven(model), 32)
    assert [width for width in widths if width >= 4] == [4, 16, 32]  # below, libraries multiply in other ways


def test_a_document_may_end() -> None:
    biased = make_model()
    with torch.no_grad():
        biased.output_bias[END] = 8
    engine = Engine(biased, END, slots=4, max_queue=4)
    sink = Sink()
    engine.submit(Request([5], SamplingParams(3), 10_000, sink))
    assert sink.wait().end == "stop" and END not in sink.tokens
    engine.close()


def test_a_long_prompt_does_not_stall_others(model: GRULanguageModel) -> None:
    slow = Slow(model)
    engine = Engine(slow, END, slots=4, max_queue=4)
    first, second = Sink(), Sink()
    engine.submit(Request([1], SamplingParams(0, temperature=0), 10_000, first))
    while not first.tokens:
        time.sleep(0.001)
    slow.shapes.clear()
    request = Request([1] * (20 * engines.CHUNK), SamplingParams(1), 1, second)
    engine.submit(request)
    second.wait()
    engine.close(drain=False)
    reads = [i for i, shape in enumerate(slow.shapes) if shape[1] == 1]
    assert len(reads) == 21 and request.read == 20 * engines.CHUNK + 1
    assert max(slow.shapes[i][0] for i in reads) == engines.CHUNK
    assert all(later - earlier == 2 for earlier, later in itertools.pairwise(reads))


def test_a_full_queue_refuses_and_a_cancelled_request_makes_room(model: GRULanguageModel) -> None:
    slow = Slow(model)
    engine = Engine(slow, END, slots=1, max_queue=2)
    slow.pause = 0.01
    sinks = [Sink() for _ in range(4)]
    handles = [Request([1], SamplingParams(0, temperature=0), 100_000, sink) for sink in sinks[:3]]
    for handle in handles:
        engine.submit(handle)
    with pytest.raises(Overloaded):
        engine.submit(Request([1], SamplingParams(0), 1, sinks[3]))
    while not sinks[0].tokens:
        time.sleep(0.001)
    assert (engine.active, engine.waiting) == (1, 2)
    engine.cancel(handles[1])  # in the queue
    assert engine.waiting == 1
    engine.cancel(handles[0])  # in a slot
    while not sinks[2].tokens:
        time.sleep(0.001)
    assert (engine.active, engine.waiting) == (1, 0)
    engine.submit(Request([1], SamplingParams(0), 1, sinks[3]))
    engine.cancel(handles[2])
    assert sinks[3].wait().tokens
    assert sinks[0].end is sinks[1].end is sinks[2].end is None
    engine.close()
    assert engine.join(10)


def test_an_error_in_the_model_reaches_every_request(model: GRULanguageModel) -> None:
    slow = Slow(model)
    engine = Engine(slow, END, slots=2, max_queue=8)
    slow.pause = 0.005
    sinks = [Sink() for _ in range(5)]
    for sink in sinks:
        engine.submit(Request([1], SamplingParams(0, temperature=0), 100_000, sink))
    slow.failing = True
    for sink in sinks:
        assert isinstance(sink.wait().end, RuntimeError) and "out of luck" in str(sink.end)
    assert engine.join(10) and engine.heartbeat == -math.inf
    with pytest.raises(Closed):
        engine.submit(Request([1], SamplingParams(0), 1, Sink()))


def test_a_receiver_that_fails_harms_nobody_else(engine: Engine) -> None:
    def broken(token: int | None, end: object) -> None:
        raise OSError("gone")

    sink = Sink()
    engine.submit(Request([1], SamplingParams(0, temperature=0), 10_000, broken))
    engine.submit(Request([2], SamplingParams(0, temperature=0), 50, sink))
    assert sink.wait().end == "length" and len(sink.tokens) == 50
    assert engine.active == 0


def test_closing_drains_or_ends(model: GRULanguageModel) -> None:
    engine = Engine(model, END, slots=2, max_queue=8)
    sinks = [Sink() for _ in range(5)]
    for sink in sinks:
        engine.submit(Request([1], SamplingParams(0, temperature=0), 40, sink))
    engine.close(drain=True)
    with pytest.raises(Closed):
        engine.submit(Request([1], SamplingParams(0), 1, Sink()))
    assert [sink.wait().end for sink in sinks] == ["length"] * 5
    assert engine.join(10)
    engine = Engine(model, END, slots=2, max_queue=8)
    sink = Sink()
    engine.submit(Request([1], SamplingParams(0, temperature=0), 10**9, sink))
    engine.close(drain=False)
    assert isinstance(sink.wait().end, Closed) and engine.join(10)


def test_an_idle_engine_sleeps_and_is_well(engine: Engine) -> None:
    run(engine, [([1], SamplingParams(0), 5)])
    time.sleep(0.05)
    assert engine.heartbeat == math.inf
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1


def test_a_long_prompt_does_not_stall_other_prompts(model: GRULanguageModel) -> None:
    slow = Slow(model)
    engine = Engine(slow, END, slots=4, max_queue=4)
    slow.pause = 0.002
    long, short = Sink(), Sink()
    request = Request([1] * (1000 * engines.CHUNK), SamplingParams(1), 1, long)
    engine.submit(request)
    while not request.read:
        time.sleep(0.001)
    before = request.read
    engine.submit(Request([1] * 10, SamplingParams(1), 1, short))
    short.wait()
    assert request.read - before <= 4 * engines.CHUNK
    engine.close(drain=False)
    assert engine.join(10)


def test_short_prompts_are_read_together(model: GRULanguageModel) -> None:
    slow = Slow(model)
    engine = Engine(slow, END, slots=8, max_queue=8)
    slow.pause = 0.02
    blocker, sinks = Sink(), [Sink() for _ in range(5)]
    engine.submit(Request([1], SamplingParams(0, temperature=0), 100_000, blocker))
    while not blocker.tokens:
        time.sleep(0.001)
    for sink in sinks:
        engine.submit(Request([1] * 9, SamplingParams(1), 1, sink))
    for sink in sinks:
        sink.wait()
    assert len(blocker.tokens) < 6, "a step for each of them"
    engine.close(drain=False)


def test_tokens_in_flight_are_counted_exactly(model: GRULanguageModel) -> None:
    slow = Slow(model)
    engine = Engine(slow, END, slots=2, max_queue=8, max_tokens=1000)
    slow.pause = 0.002
    first, second, third = (Sink() for _ in range(3))
    one = Request([1] * 100, SamplingParams(0, temperature=0), 500, first)
    engine.submit(one)
    with pytest.raises(Overloaded, match="in flight"):
        engine.submit(Request([1], SamplingParams(0), 400, third))
    engine.submit(Request([1], SamplingParams(0), 399, second))
    assert engine.tokens_in_flight == 1000
    engine.cancel(one)
    while engine.tokens_in_flight > 400:
        time.sleep(0.001)
    engine.submit(Request([1], SamplingParams(0), 599, third))
    engine.close(drain=False)
    assert engine.join(10) and engine.tokens_in_flight == 0


def test_a_deadline_ends_a_request_wherever_it_is(model: GRULanguageModel) -> None:
    slow = Slow(model)
    engine = Engine(slow, END, slots=2, max_queue=8)
    slow.pause = 0.005
    deadline = time.monotonic() + 0.3
    prompts = [1], [1] * 1_000_000, [1]  # in a row, being read, in the queue
    sinks = [Sink() for _ in prompts]
    for prompt, sink in zip(prompts, sinks, strict=True):
        request = Request(prompt, SamplingParams(0, temperature=0), 10**9, sink, deadline=deadline)
        engine.submit(request)
    assert all(isinstance(sink.wait().end, Expired) for sink in sinks)
    assert sinks[0].tokens and not sinks[1].tokens and engine.active + engine.waiting == 0
    assert run(engine, [([1], SamplingParams(0, temperature=0), 5)]) == [sinks[0].tokens[:5]]
    engine.close()


def test_the_caller_may_end_a_text_at_any_token(engine: Engine) -> None:
    [free] = run(engine, [([1], SamplingParams(5), 40)])
    sink = Sink()
    seen: list[int] = []

    def ends(token: int) -> bool:
        seen.append(token)
        return len(seen) == 7

    engine.submit(Request([1], SamplingParams(5), 40, sink, ends=ends))
    assert sink.wait().tokens == free[:7] == seen and sink.end == "stop"


def test_logprobs_are_those_of_the_model(model: GRULanguageModel, engine: Engine) -> None:
    prompt, sink = [5, 9, *range(20, 20 + 3 * engines.CHUNK)], Sink()
    request = Request(prompt, SamplingParams(3), 10, sink, top_logprobs=4, score_prompt=True)
    engine.submit(request)
    text = sink.wait().tokens
    with torch.inference_mode():
        inputs = [END, *prompt, *text]
        logits, _ = model(torch.tensor(inputs).unsqueeze(1), model.initial_state(1))
    expected = [logprobs(row, token, 4) for row, token in zip(logits[:-1, 0].numpy(), inputs[1:], strict=True)]
    told = request.prompt_logprobs + request.logprobs
    assert len(request.prompt_logprobs) == len(prompt) and len(told) == len(expected)
    for ours, theirs in zip(told, expected, strict=True):
        assert ours.token == pytest.approx(theirs.token, abs=1e-5)
        assert [token for token, _ in ours.top] == [token for token, _ in theirs.top]


def test_a_prompt_can_be_scored_without_writing(engine: Engine) -> None:
    sink = Sink()
    request = Request([5, 6, 7], SamplingParams(0), 0, sink, top_logprobs=0, score_prompt=True)
    engine.submit(request)
    assert sink.wait().end == "length" and not sink.tokens and len(request.prompt_logprobs) == 3


def test_a_session_goes_on_as_if_all_had_been_one_text(model: GRULanguageModel) -> None:
    engine = Engine(model, END, slots=4, max_queue=8, cache_bytes=1 << 20)
    greedy = SamplingParams(0, temperature=0)
    [whole] = run(engine, [([7, 8], greedy, 30)])
    first, second = Sink(), Sink()
    one = Request([7, 8], greedy, 12, first, session="s", owner="a")
    engine.submit(one)
    first.wait()
    two = Request([], greedy, 18, second, session="s", owner="a")
    engine.submit(two)
    assert first.tokens + second.wait().tokens == whole
    assert (one.resumed, two.resumed) == (0, 14)
    other = Sink()
    engine.submit(Request([7, 8], greedy, 12, other, session="s", owner="b"))  # somebody else's of the same name
    assert other.wait().tokens == whole[:12]
    engine.close()


def test_a_session_stays_where_it_was_if_a_request_does_not_end_by_itself(model: GRULanguageModel) -> None:
    slow = Slow(model)
    engine = Engine(slow, END, slots=4, max_queue=8, cache_bytes=1 << 20)
    greedy = SamplingParams(0, temperature=0)
    [whole] = run(engine, [([7, 8], greedy, 30)])
    first, left, second = Sink(), Sink(), Sink()
    engine.submit(Request([7, 8], greedy, 12, first, session="s"))
    first.wait()
    slow.pause = 0.01
    leaving = Request([], greedy, 10_000, left, session="s")
    engine.submit(leaving)
    while len(left.tokens) < 5:
        time.sleep(0.001)
    engine.cancel(leaving)
    slow.pause = 0
    while engine.active:
        time.sleep(0.001)
    engine.submit(Request([], greedy, 18, second, session="s"))
    assert first.tokens + second.wait().tokens == whole
    engine.close()


def test_beginnings_of_prompts_are_read_once_and_change_nothing(model: GRULanguageModel) -> None:
    slow = Slow(model)
    engine = Engine(slow, END, slots=4, max_queue=8, cache_bytes=1 << 20)
    plain = Engine(model, END, slots=4, max_queue=8)
    shared = np.random.default_rng(0).integers(1, VOCAB, 5 * engines.CHUNK).tolist()
    requests = [([*shared, i], SamplingParams(i), 20) for i in range(4)]
    expected = run(plain, requests)
    assert run(engine, requests[:1]) == expected[:1]
    for request, text in zip(requests[1:], expected[1:], strict=True):
        slow.shapes.clear()
        sink = Sink()
        handle = Request(*request, sink)
        engine.submit(handle)
        assert sink.wait().tokens == text
        assert handle.cached == 5 * engines.CHUNK
        assert sum(shape[0] for shape in slow.shapes if shape[1] == 1) == 2
    other = Sink()
    stranger = Request(*requests[0], other, owner="else")
    engine.submit(stranger)
    assert other.wait().tokens == expected[0] and stranger.cached == 0
    engine.close()
    plain.close()


def test_penalties_see_the_prompt_and_the_text(engine: Engine) -> None:
    # A repetition penalty this strong makes a greedy text go through the vocabulary before it says anything twice.
    params = SamplingParams(0, temperature=0, repetition_penalty=1e6)
    prompt = list(range(1, 101))
    [text] = run(engine, [(prompt, params, 150)])
    assert len(set(text)) == 150 and not set(text) & set(prompt)
