"""Other people's clients, with their defaults and in an environment of their own, against a real server."""

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml

from gru.config import TokenizerConfig
from gru.corpus import tokenizer as tokenizers
from gru.evaluation.scores import read_heldout, token_losses
from tests.gru.serving.server import Server

ENVIRONMENT = Path(__file__).parents[4] / ".venv-clients"
SETTINGS: dict[str, Any] = {"model": "poet", "max_tokens": 40, "seed": 3}
CHAT: Any = [{"role": "user", "content": "Once"}]

LITELLM = """
import json, sys, litellm
server = {"api_base": sys.argv[1] + "/v1", "api_key": "none", "max_tokens": 40, "seed": 3}
prompt, messages = "Once", [{"role": "user", "content": "Once"}]
texts = {}
for name in ("openai/poet", "text-completion-openai/poet", "hosted_vllm/poet"):
    whole = litellm.text_completion(model=name, prompt=prompt, **server).choices[0].text
    chunks = litellm.text_completion(model=name, prompt=prompt, stream=True, **server)
    texts[name] = [whole, "".join(chunk.choices[0].text or "" for chunk in chunks)]
for name in ("openai/poet", "hosted_vllm/poet"):
    whole = litellm.completion(model=name, messages=messages, **server).choices[0].message.content
    chunks = litellm.completion(model=name, messages=messages, stream=True, **server)
    texts["chat " + name] = [whole, "".join(chunk.choices[0].delta.content or "" for chunk in chunks)]
try:
    litellm.completion(model="openai/other", messages=messages, **server)
except litellm.NotFoundError as error:
    texts["error"] = str(error)
print(json.dumps(texts))
"""

LANGCHAIN = """
import json, sys
from langchain_openai import ChatOpenAI, OpenAI
server = {"base_url": sys.argv[1] + "/v1", "api_key": "none", "model": "poet"}
settings = {"max_tokens": 40, "seed": 3}
llm, chat, responses = OpenAI(**server, **settings), ChatOpenAI(**server, **settings), ChatOpenAI(
    **server, max_tokens=40, use_responses_api=True, temperature=0)
print(json.dumps({
    "llm": [llm.invoke("Once"), "".join(llm.stream("Once")), llm.batch(["Twice", "Once"])[1]],
    "chat": [chat.invoke("Once").text, "".join(chunk.text for chunk in chat.stream("Once"))],
    "responses": [responses.invoke("Once").text, "".join(chunk.text for chunk in responses.stream("Once"))],
    "tokens": chat.invoke("Once").usage_metadata["output_tokens"],
}))
"""

NODE = """
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.argv[2] + "/v1", apiKey: "none" });
const settings = { model: "poet", max_tokens: 40, seed: 3 }, prompt = "Once";
const messages = [{ role: "user", content: prompt }];
const whole = await client.completions.create({ prompt, ...settings });
const texts = [whole.choices[0].text, ""];
for await (const chunk of await client.completions.create({ prompt, stream: true, ...settings })) {
  texts[1] += chunk.choices[0].text;
}
const chat = await client.chat.completions.create({ messages, ...settings });
const final = await client.chat.completions.stream({ messages, ...settings }).finalChatCompletion();
const fields = { model: "poet", input: prompt, max_output_tokens: 40, temperature: 0 };
const response = await client.responses.create(fields);
const streamed = await client.responses.stream(fields).finalResponse();
const models = []; for await (const model of await client.models.list()) models.push(model.id);
const error = await client.completions.create({ model: "other", prompt }).catch((error) => error);
console.log(JSON.stringify({
  texts, models, error: [error instanceof OpenAI.NotFoundError, error.code],
  chat: [chat.choices[0].message.content, final.choices[0].message.content],
  responses: [response.output_text, streamed.output_text],
}));
"""


def run(*command: str | Path, **environment: str) -> str:
    """Run a command and return what it prints."""
    if not (ENVIRONMENT / ".installed").exists():
        pytest.fail("the clients are not installed: use `make test-clients`")
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": "", **environment},
        capture_output=True,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def python(*arguments: str | Path, **environment: str) -> str:
    """Run Python with the clients and return what it prints. Nothing is fetched from elsewhere."""
    offline = {"HF_HUB_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    return run(ENVIRONMENT / "bin" / "python", *arguments, **offline, **environment)


def completion(client: openai.OpenAI, temperature: float = 1.0) -> str:
    """Return the text that the clients should get for the prompt."""
    return client.completions.create(prompt="Once", temperature=temperature, **SETTINGS).choices[0].text


def answer(client: openai.OpenAI) -> str:
    """Return the answer that the clients should get in a chat."""
    return client.chat.completions.create(messages=CHAT, **SETTINGS).choices[0].message.content or ""


def response(client: openai.OpenAI) -> str:
    """Return the likeliest answer of the Responses API."""
    return client.responses.create(model="poet", input="Once", max_output_tokens=40, temperature=0).output_text


@pytest.mark.clients
def test_litellm(server: Server, client: openai.OpenAI) -> None:
    texts = json.loads(python("-c", LITELLM, server.url).splitlines()[-1])
    assert "the model 'other' does not exist" in texts.pop("error") and len(texts) == 5
    for name, got in texts.items():
        assert got == [answer(client) if name.startswith("chat") else completion(client)] * 2, name


@pytest.mark.clients
def test_langchain(server: Server, client: openai.OpenAI) -> None:
    texts = json.loads(python("-c", LANGCHAIN, server.url))
    assert texts["llm"] == [completion(client, temperature=0.7)] * 3 and texts["chat"] == [answer(client)] * 2
    assert texts["responses"] == [response(client)] * 2 and 0 < texts["tokens"] <= 40


@pytest.mark.clients
def test_openai_in_javascript(server: Server, client: openai.OpenAI, tmp_path: Path) -> None:
    (tmp_path / "node_modules").symlink_to(ENVIRONMENT / "node_modules")
    (tmp_path / "program.mjs").write_text(NODE)
    got = json.loads(run("node", tmp_path / "program.mjs", server.url))
    assert got["texts"] == [completion(client)] * 2 and got["chat"] == [answer(client)] * 2
    assert got["responses"] == [response(client)] * 2
    assert got["models"] == ["poet"] and got["error"] == [True, "model_not_found"]


TASKS: dict[str, dict[str, Any]] = {
    "heldout": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": ["yes", "no"],
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}],
    },
    "texts": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 30},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.mark.clients
def test_lm_eval(server: Server, client: openai.OpenAI, tmp_path: Path) -> None:
    texts = ["The moon, déjà vu, and the river." * 30, "明月 and the river"]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = {"data_files": {"test": str(tmp_path / "texts.jsonl")}, "cache_dir": str(tmp_path / "cache")}
    for name, fields in TASKS.items():
        task = {"task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test", **fields}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(task))
    model = f"model=poet,base_url={server.url}/v1/completions"
    tasks = ",".join(str(tmp_path / f"{name}.yaml") for name in TASKS)
    arguments = ("--model_args", model, "--tasks", tasks, "--output_path", tmp_path, "--log_samples")
    python("-m", "lm_eval", "--model", "local-completions", *arguments, HF_HOME=str(tmp_path / "huggingface"))
    [report] = (tmp_path / "poet").glob("results_*.json")
    samples = {
        name: [json.loads(line)["resps"] for line in next(report.parent.glob(f"samples_{name}_*")).open()]
        for name in TASKS
    }
    nats = size = 0.0
    for text in texts:  # lm-eval does not score the end of a text
        heldout = read_heldout(server.bundle.tokenizer, [text], len(text.encode()))
        nats += float(token_losses(server.bundle.model, heldout, 1)[:-1].sum())
        size += heldout.bytes
    measured = json.loads(report.read_text())["results"]["heldout"]["bits_per_byte,none"]
    assert measured == pytest.approx(nats / math.log(2) / size, rel=1e-3)
    for text, resps, [[generated]] in zip(texts, samples["choices"], samples["texts"], strict=True):
        for choice, [[logprob, _]] in zip((" yes", " no"), resps, strict=True):
            scored = client.completions.create(model="poet", prompt=text + choice, max_tokens=0, echo=True, logprobs=0)
            logprobs = scored.choices[0].logprobs
            assert logprobs and logprobs.token_logprobs
            assert float(logprob) == pytest.approx(sum(logprobs.token_logprobs[-len(choice) :]), abs=1e-3)
        expected = client.completions.create(model="poet", prompt=text, max_tokens=30, temperature=0, stop="\n\n")
        assert generated == expected.choices[0].text


@pytest.mark.clients
@pytest.mark.parametrize("format", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
def test_guidellm(server: Server, tmp_path: Path, format: str) -> None:
    tokenizer = tokenizers.train_tokenizer(TokenizerConfig(kind="byte"), ["any text"])
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.json)
    options = {
        "backend": f"kind=openai_http,target={server.url},request_format={format}",
        "profile": "kind=concurrent,streams=2",
        "constraint": "kind=max_requests,count=6",
        "data": "kind=synthetic_text,prompt_tokens=50,output_tokens=200",
        "tokenizer": f"kind=hf_auto,model={tmp_path}",
        "output": f"kind=json,path={tmp_path / 'report.json'}",
    }
    arguments = [argument for name, value in options.items() for argument in (f"--{name}", value)]
    run(ENVIRONMENT / "bin" / "guidellm", "run", "--disable-console", *arguments, HF_HUB_OFFLINE="1")
    [benchmark] = json.loads((tmp_path / "report.json").read_text())["benchmarks"]
    requests = benchmark["requests"]
    assert not requests["errored"] and len(requests["successful"]) == 6
    assert {request["output_tokens"] for request in requests["successful"]} == {200}
