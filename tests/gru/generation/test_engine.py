"""The texts that the engine generates, and their log-probabilities."""

import pytest
import torch

from gru.generation import engine as engines
from gru.generation.engine import Engine
from gru.generation.request import Request
from gru.generation.sampling import Draw, SamplingParams, logprobs, sample
from gru.model.inference import inference_model
from gru.model.language_model import GRULanguageModel
from tests.gru.generation.helpers import END, Recorder, make_model, params, prompts, run


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
    """Compared bit for bit: logits by what is sampled from them, hidden states by the 60 steps that carry them on."""
    model = inference_model(make_model(*shape)) if compiled else make_model(*shape)
    monkeypatch.setattr(engines, "LARGEST_WIDTH", 8)  # fewer than the slots
    requests = [(prompt, params(i), 20 + 7 * i % 60) for i, prompt in enumerate(prompts(12))]
    answers = []
    for slots in (1, 5, 12):  # other streams in the batch, other widths, a new engine
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


def test_a_document_may_end() -> None:
    biased = make_model()
    with torch.no_grad():
        biased.output_bias[END] = 8
    engine = Engine(biased, END, slots=4, max_queue=4)
    recorder = Recorder()
    engine.submit(Request([5], SamplingParams(3), 10_000, recorder))
    assert recorder.wait().end == "stop" and END not in recorder.tokens
    engine.close()


def test_the_receiver_may_end_a_text_at_any_token(engine: Engine) -> None:
    [free] = run(engine, [([1], SamplingParams(5), 40)])
    recorder = Recorder(stop_after=7)
    engine.submit(Request([1], SamplingParams(5), 40, recorder))
    assert recorder.wait().tokens == free[:7] and recorder.end == "stop"


def test_logprobs_are_those_of_the_model(model: GRULanguageModel, engine: Engine) -> None:
    prompt, recorder = [5, 9, *range(20, 20 + 3 * engines.CHUNK)], Recorder()
    stream = engine.submit(Request(prompt, SamplingParams(3), 10, recorder, top_logprobs=4, score_prompt=True))
    text = recorder.wait().tokens
    with torch.inference_mode():
        inputs = [END, *prompt, *text]
        logits, _ = model(torch.tensor(inputs).unsqueeze(1), model.initial_state(1))
    expected = [logprobs(row, token, 4) for row, token in zip(logits[:-1, 0].numpy(), inputs[1:], strict=True)]
    reported = stream.prompt_logprobs + stream.logprobs
    assert len(stream.prompt_logprobs) == len(prompt) and len(reported) == len(expected)
    assert recorder.logprobs == stream.logprobs
    for ours, theirs in zip(reported, expected, strict=True):
        assert ours.token == pytest.approx(theirs.token, abs=1e-5)
        assert [token for token, _ in ours.top] == [token for token, _ in theirs.top]


def test_a_prompt_can_be_scored_without_generating(engine: Engine) -> None:
    recorder = Recorder()
    stream = engine.submit(Request([5, 6, 7], SamplingParams(0), 0, recorder, top_logprobs=0, score_prompt=True))
    assert recorder.wait().end == "length" and not recorder.tokens and len(stream.prompt_logprobs) == 3


def test_penalties_see_the_prompt_and_the_text(engine: Engine) -> None:
    # With a repetition penalty this strong a greedy text uses all other tokens before it repeats one.
    params = SamplingParams(0, temperature=0, repetition_penalty=1e6)
    prompt = list(range(1, 101))
    [text] = run(engine, [(prompt, params, 150)])
    assert len(set(text)) == 150 and not set(text) & set(prompt)
