"""The HTTP interface through a real server and OpenAI's own client: the texts, models and health."""

import time
from typing import Any

import httpx
import openai
import torch

from tests.gru.serving.server import Server, wait_until


def test_whole_and_streamed_texts_are_the_same(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "poet", "prompt": "Once", "max_tokens": 120, "seed": 5}
    whole = client.completions.create(**fields)
    assert whole.usage is not None and whole.choices[0].finish_reason == "length"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (4, 120, 124)
    chunks = list(client.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks[:-1]) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage and chunks[-1].choices == []
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert client.completions.create(**fields).choices[0].text == whole.choices[0].text
    fields["seed"] = 6
    assert client.completions.create(**fields).choices[0].text != whole.choices[0].text


def test_without_a_seed_each_text_has_a_new_one(client: openai.OpenAI) -> None:
    twice = client.completions.create(model="poet", prompt=["a", "a"])
    assert twice.choices[0].text != twice.choices[1].text
    texts = {client.completions.create(model="poet", prompt="a").choices[0].text for _ in range(5)}
    assert len(texts) > 1


def test_several_prompts_and_choices(client: openai.OpenAI) -> None:
    many = client.completions.create(model="poet", prompt=["ab", "cde"], n=3, seed=9, max_tokens=20)
    assert [c.index for c in many.choices] == list(range(6))
    assert len({c.text for c in many.choices[:3]}) == 3
    assert many.usage is not None and (many.usage.prompt_tokens, many.usage.completion_tokens) == (5, 120)
    alone = client.completions.create(model="poet", prompt="cde", seed=9, max_tokens=20)
    assert alone.choices[0].text == many.choices[3].text
    texts = [""] * 6
    for chunk in client.completions.create(model="poet", prompt=["ab", "cde"], n=3, seed=9, max_tokens=20, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [c.text for c in many.choices]


def test_stop_strings_end_the_text_and_free_the_slot(server: Server, client: openai.OpenAI) -> None:
    free = client.completions.create(model="poet", prompt="x", seed=1, max_tokens=60).choices[0].text
    stop = free[20:23]
    expected = free[: free.index(stop)]
    fields: dict[str, Any] = {"model": "poet", "prompt": "x", "seed": 1, "max_tokens": 100_000, "stop": [stop]}
    whole = client.completions.create(**fields)
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == (expected, "stop")
    assert whole.usage is not None and whole.usage.completion_tokens == len(expected) + 3
    assert "".join(c.choices[0].text for c in client.completions.create(**fields, stream=True)) == expected
    wait_until(lambda: server.engine.active == 0)
    echoed = client.completions.create(**fields, echo=True).choices[0].text
    assert echoed == "x" + expected


def test_the_end_of_a_document_is_a_stop(server: Server, client: openai.OpenAI) -> None:
    bias, end = server.bundle.model.output_bias, server.bundle.tokenizer.end_of_text
    with torch.no_grad():
        bias[end] = 100
    try:
        answer = client.completions.create(model="poet", prompt="", temperature=0)
    finally:
        with torch.no_grad():
            bias[end] = -5
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("", "stop")


def test_tokens_are_streamed_as_they_are_generated(server: Server, client: openai.OpenAI) -> None:
    server.model.pause = 0.01
    start = time.monotonic()
    times = [
        time.monotonic() - start
        for _ in client.completions.create(model="poet", prompt="x", max_tokens=100, stream=True)
    ]
    assert times[0] < 0.3 * times[-1] and len(times) > 10


def test_a_chat_is_the_completion_of_its_template(client: openai.OpenAI) -> None:
    messages: Any = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Who "}, {"type": "text", "text": "{role}?"}]},
    ]
    fields: dict[str, Any] = {"model": "poet", "seed": 2, "temperature": 0.7}
    prompt = "system: Be brief.\nuser: Who {role}?\nassistant: "
    expected = client.completions.create(prompt=prompt, max_tokens=300, stop=["\n"], **fields)
    whole = client.chat.completions.create(messages=messages, max_completion_tokens=300, **fields)
    message = whole.choices[0].message
    assert (message.role, message.content) == ("assistant", expected.choices[0].text)
    assert whole.choices[0].finish_reason == expected.choices[0].finish_reason
    assert whole.usage is not None and whole.usage.prompt_tokens == len(prompt)
    chunks = list(client.chat.completions.create(messages=messages, max_tokens=300, stream=True, n=2, **fields))
    deltas = [chunk.choices[0] for chunk in chunks]
    assert [delta.delta.role for delta in deltas].count("assistant") == 2
    assert "".join(d.delta.content or "" for d in deltas if d.index == 0) == message.content
    assert sum(d.finish_reason is not None for d in deltas) == 2


def test_logprobs_match_the_text(server: Server, client: openai.OpenAI) -> None:
    # At this temperature the model generates printable characters only.
    fields: dict[str, Any] = {"model": "poet", "prompt": "Once", "seed": 5, "max_tokens": 40, "temperature": 0.5}
    fields["logprobs"] = 3
    [choice] = client.completions.create(**fields).choices
    logprobs = choice.logprobs
    assert logprobs is not None and logprobs.tokens is not None and logprobs.text_offset is not None
    assert "".join(logprobs.tokens) == choice.text and len(logprobs.tokens) == 40
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        assert choice.text[offset : offset + len(token)] == token
    assert logprobs.token_logprobs is not None and all(value <= 0 for value in logprobs.token_logprobs)
    assert logprobs.top_logprobs is not None and all(len(top) in (3, 4) for top in logprobs.top_logprobs)
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert top[token] == logprob and (len(top) == 3 or logprob == min(top.values()))
    assert any(len(top) == 4 for top in logprobs.top_logprobs), "a token outside the three likeliest"
    parts = [c.choices[0].logprobs for c in client.completions.create(**fields, stream=True)]
    assert [token for part in parts if part for token in part.tokens or []] == logprobs.tokens
    [echoed] = client.completions.create(**fields, echo=True).choices
    assert echoed.logprobs is not None and echoed.logprobs.tokens == [*"Once", *logprobs.tokens]
    assert echoed.logprobs.text_offset == [0, 1, 2, 3, *(4 + offset for offset in logprobs.text_offset)]
    [scored] = client.completions.create(**{**fields, "max_tokens": 0}, echo=True).choices
    assert scored.logprobs is not None and (scored.text, scored.finish_reason) == ("Once", "length")
    assert scored.logprobs.token_logprobs == echoed.logprobs.token_logprobs[:4]  # type: ignore[index]
    chat = client.chat.completions.create(
        model="poet",
        messages=[{"role": "user", "content": "x"}],
        temperature=0.5,
        logprobs=True,
        top_logprobs=2,
        max_tokens=9,
    )
    tokens = chat.choices[0].logprobs
    assert tokens is not None and tokens.content is not None
    assert "".join(each.token for each in tokens.content) == chat.choices[0].message.content
    assert all(len(each.top_logprobs) == 2 and each.bytes for each in tokens.content)


def test_logprobs_end_with_the_text_at_a_stop_string(server: Server, client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "poet", "prompt": "x", "seed": 1, "max_tokens": 60, "temperature": 0.5}
    fields["logprobs"] = 0
    free = client.completions.create(**fields).choices[0].text
    [choice] = client.completions.create(**fields, stop=free[20:23]).choices
    assert choice.logprobs is not None and "".join(choice.logprobs.tokens or []) == choice.text


def test_an_incomplete_character_is_spelled_in_bytes(server: Server, client: openai.OpenAI) -> None:
    bias = {str(byte): 100 for byte in "\u6625".encode()[:1]}
    [choice] = client.completions.create(model="poet", prompt="", max_tokens=2, logit_bias=bias, logprobs=0).choices
    assert choice.logprobs is not None and choice.logprobs.tokens == ["bytes:\\xe6"] * 2
    assert choice.text == "\ufffd" * 2


def test_prompts_may_be_token_ids(server: Server, client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "poet", "seed": 5, "max_tokens": 20}
    texts = [choice.text for choice in client.completions.create(prompt=["Once", "Twice"], **fields).choices]
    ids = [list(b"Once"), list(b"Twice")]
    assert client.completions.create(prompt=ids[0], **fields).choices[0].text == texts[0]
    assert [choice.text for choice in client.completions.create(prompt=ids, **fields).choices] == texts
    end = server.bundle.tokenizer.end_of_text
    scoring: dict[str, Any] = {"model": "poet", "max_tokens": 0, "echo": True, "logprobs": 1}
    [plain] = client.completions.create(prompt="Once", **scoring).choices
    [begun] = client.completions.create(prompt=[end, *b"Once"], **scoring).choices
    assert plain.text == begun.text == "Once" and plain.logprobs and begun.logprobs
    assert begun.logprobs.tokens == ["<|endoftext|>", *plain.logprobs.tokens]  # type: ignore[misc]
    assert begun.logprobs.token_logprobs == [None, *plain.logprobs.token_logprobs]  # type: ignore[misc]
    assert begun.logprobs.text_offset == [0, *plain.logprobs.text_offset]  # type: ignore[misc]
    [alone] = client.completions.create(prompt=[end], **scoring).choices
    assert alone.logprobs and (alone.logprobs.tokens, alone.logprobs.token_logprobs) == (["<|endoftext|>"], [None])


def test_a_text_need_not_end_with_the_document(server: Server, client: openai.OpenAI) -> None:
    bias, end = server.bundle.model.output_bias, server.bundle.tokenizer.end_of_text
    fields: dict[str, Any] = {"model": "poet", "prompt": "x", "max_tokens": 30, "seed": 1}
    with torch.no_grad():
        bias[end] = 100
    try:
        ends = [
            client.completions.create(**fields, extra_body=extra).usage
            for extra in ({}, {"min_tokens": 7}, {"ignore_eos": True})
        ]
        scored = [
            client.completions.create(**fields, logprobs=1, echo=True, stream=True),
            client.completions.create(**fields, logprobs=1, echo=True).choices,
        ]
        chat = client.chat.completions.create(
            model="poet", messages=[{"role": "user", "content": "x"}], logprobs=True, extra_body={"min_tokens": 3}
        )
    finally:
        with torch.no_grad():
            bias[end] = -5
    assert [usage and usage.completion_tokens for usage in ends] == [0, 7, 30]
    stream, [choice] = scored[0], scored[1]
    for logprobs in (choice.logprobs, [chunk.choices[0].logprobs for chunk in stream][-1]):
        # lm-eval takes the last token for a generated one, which is there even if it ends the document.
        assert (logprobs.tokens, logprobs.text_offset) == (["x", "<|endoftext|>"], [0, 1])
        assert logprobs.token_logprobs[-1] > -0.01
    assert chat.choices[0].logprobs and len(chat.choices[0].logprobs.content or ()) == 3


def test_no_stop_string_ends_a_text_before_min_tokens(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "poet", "prompt": "x", "max_tokens": 30, "logit_bias": {"65": 100}}
    [choice] = client.completions.create(**fields, stop="AA", extra_body={"min_tokens": 7}).choices
    assert (choice.text, choice.finish_reason) == ("A" * 7, "stop")
    [choice] = client.completions.create(**fields, stop="AA", extra_body={"ignore_eos": True}).choices
    assert (choice.text, choice.finish_reason) == ("", "stop")


def test_with_ignore_eos_a_message_does_not_end_either(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "poet", "extra_body": {"ignore_eos": True, "logit_bias": {"10": 100}}}
    chat = client.chat.completions.create(messages=[{"role": "user", "content": "x"}], max_tokens=9, **fields)
    response = client.responses.create(input="x", max_output_tokens=9, **fields)
    assert chat.choices[0].message.content == response.output_text == "\n" * 9


def test_the_tokenizer_is_there_as_in_vllm(server: Server) -> None:
    def post(path: str, **fields: Any) -> Any:
        return httpx.post(f"{server.url}/{path}", json=fields).json()

    text, ids = "d\u00e9j\u00e0 <|endoftext|>", [*"d\u00e9j\u00e0 <|endoftext|>".encode()]
    tokenized = post("tokenize", prompt=text, model="poet", return_token_strs=True)
    assert (tokenized["tokens"], tokenized["count"]) == (ids, len(ids)) and tokenized["token_strs"][0] == "d"
    assert post("detokenize", tokens=ids) == {"prompt": text}
    info = httpx.get(f"{server.url}/tokenizer_info").json()
    assert post("tokenize", prompt=info["eos_token"])["tokens"] == [server.bundle.tokenizer.end_of_text]
    assert post("detokenize", tokens=[9999])["error"]["param"] == "tokens"
    assert post("detokenize", tokens=["x"])["error"]["message"] == "tokens: expected a list of token ids"
    assert post("tokenize")["error"]["param"] == "prompt"
    assert post("tokenize", prompt="x", model="gpt-5")["error"]["code"] == "model_not_found"


def test_chats_may_have_tool_messages_and_empty_ones(client: openai.OpenAI) -> None:
    messages: Any = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": None},
        {"role": "tool", "content": "4", "tool_call_id": "1"},
    ]
    extra: Any = {"tool_choice": "none"}
    assert client.chat.completions.create(model="poet", messages=messages, extra_body=extra).usage.prompt_tokens == 39  # type: ignore[union-attr]


def test_sampling_fields_reach_the_text(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "poet", "prompt": "x", "max_tokens": 60, "temperature": 0}
    plain = client.completions.create(**fields).choices[0].text
    fresh = client.completions.create(**fields, extra_body={"repetition_penalty": 10}).choices[0].text
    assert len(set(fresh)) > len(set(plain))
    assert client.completions.create(**fields, logit_bias={"65": 100}).choices[0].text == "A" * 60
    assert client.completions.create(**{**fields, "temperature": 1, "top_p": 0}).choices[0].text == plain
    least = client.completions.create(**{**fields, "temperature": 2}, extra_body={"min_p": 1}).choices[0].text
    assert least == plain


def test_a_session_resumes_without_the_text_sent_again(server: Server, client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "poet", "temperature": 0, "max_tokens": 20}
    whole = client.completions.create(**{**fields, "max_tokens": 40}, prompt="Once").choices[0].text
    session = {"session_id": "mine"}
    first = client.completions.create(**fields, prompt="Once", extra_body=session)
    second = client.completions.create(**fields, prompt="", extra_body=session)
    assert first.choices[0].text + second.choices[0].text == whole
    assert first.to_dict()["session"] == {"id": "mine", "resumed_tokens": 0}
    assert second.to_dict()["session"] == {"id": "mine", "resumed_tokens": 24}
    third = list(client.completions.create(**fields, prompt="ab", extra_body=session, stream=True))
    assert third[0].to_dict()["session"] == {"id": "mine", "resumed_tokens": 44}
    seeded: dict[str, Any] = {"model": "poet", "prompt": "Once", "seed": 3, "frequency_penalty": 0.5}
    one = client.completions.create(**seeded, max_tokens=40).choices[0].text
    parts = [
        client.completions.create(**{**seeded, "prompt": prompt}, max_tokens=20, extra_body={"session_id": "seeded"})
        for prompt in ("Once", "")
    ]
    assert "".join(part.choices[0].text for part in parts) == one  # positions and penalties continue
    server.new_engine("4")
    other = client.completions.create(**fields, prompt="", extra_body=session)
    assert other.to_dict()["session"] == {"id": "mine", "resumed_tokens": 0}  # a state belongs to one model
    server.engine.close()


def test_a_stop_string_may_span_two_requests_of_a_session(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "poet", "seed": 3}
    free = client.completions.create(**fields, prompt="Once", max_tokens=40).choices[0].text
    ends: set[str] = set()
    for stop in (free[17:22], free[20:24], free[17:20] + "~"):
        whole = client.completions.create(**fields, prompt="Once", max_tokens=40, stop=stop).choices[0]
        for cut in (18, 19, 20, 21):
            session = {"session_id": f"{stop} {cut}"}
            first = client.completions.create(**fields, extra_body=session, prompt="Once", max_tokens=cut, stop=stop)
            second = client.completions.create(
                **fields, extra_body=session, prompt="", max_tokens=40 - cut, stop=stop, stream=True
            )
            chunks = [chunk.choices[0] for chunk in second]
            texts = [first.choices[0].text, "".join(chunk.text for chunk in chunks)]
            assert "".join(texts) == whole.text and chunks[-1].finish_reason == whole.finish_reason
            ends.add(str(whole.finish_reason))
            held = first.to_dict()["session"].get("held_text", "")  # type: ignore[attr-defined]
            assert texts[0] + held == free[:cut] and (cut > 18 or stop == free[20:24] or held == free[17:18])
    assert ends == {"stop", "length"}


def test_a_character_may_span_two_requests_of_a_session(client: openai.OpenAI) -> None:
    texts = []
    for byte in "\u6625".encode():
        biased = client.completions.create(
            model="poet", prompt="", max_tokens=1, logit_bias={str(byte): 100}, extra_body={"session_id": "bytes"}
        )
        texts.append((biased.choices[0].text, biased.to_dict()["session"].get("held_text")))  # type: ignore[attr-defined]
    assert texts == [("", "\ufffd"), ("", "\ufffd"), ("\u6625", None)]


def test_a_prompt_ends_the_text_that_a_session_has_held_back(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "poet", "max_tokens": 4, "logit_bias": {"65": 100}, "stop": "AAAAAA"}
    session = {"extra_body": {"session_id": "prompted"}}
    first = client.completions.create(**fields, prompt="x", **session)
    assert (first.choices[0].text, first.to_dict()["session"]["held_text"]) == ("", "AAAA")  # type: ignore[index]
    second = client.completions.create(**{**fields, "max_tokens": 7}, prompt="b", **session)
    assert (second.choices[0].text, second.usage and second.usage.completion_tokens) == ("", 6)


def test_a_shared_prompt_prefix_is_read_once(client: openai.OpenAI) -> None:
    usages = [client.completions.create(model="poet", prompt="x" * 300 + end).usage for end in "ab"]
    usages += [client.completions.create(model="poet", prompt="x" * 300, n=3).usage]
    details = [usage.to_dict()["prompt_tokens_details"] for usage in usages if usage]
    assert details == [{"cached_tokens": 0}, {"cached_tokens": 255}, {"cached_tokens": 255}]
