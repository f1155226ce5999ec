"""Speed of the endpoint: the engine compared with its matrix products alone, in bf16 with fp32, and with an earlier
version; HTTP compared with the engine and with a Serve app that computes nothing; all of it with llama-server, if that
is installed (the extra `llama`). All run on this machine, the clients included.

python -m tests.benchmarks.serving [--only engine http first streams llama] [--against CHECKOUT]
"""

import argparse
import asyncio
import json
import math
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from gru.config import CorpusConfig, ServeConfig, TokenizerConfig
from gru.config_stages import ServeResources
from gru.corpus import tokenizer
from gru.corpus.documents import documents
from gru.corpus.listing import list_files
from gru.corpus.partitions import plan
from gru.corpus.report import Report
from gru.corpus.tokenizer import Tokenizer
from gru.network import free_port
from gru.registry import tracking, versions
from gru.registry.bundle import write_bundle
from gru.serving import deployment
from jobs import entry
from tests.benchmarks.clients import first_tokens, load, open_streams, throughput
from tests.benchmarks.engine import END, MODEL, STREAMS, VOCABULARY, engine, model, show
from tests.gru.registry.bundles import LINEAGE

NAME = "benchmark"


def train_tokenizer() -> Tokenizer:
    """Return a BPE tokenizer of Python's standard library."""
    corpus = CorpusConfig(sources=["python-stdlib"])
    [partition, *_] = plan(list_files(corpus).files, corpus)
    texts = [text for span in partition[:100] for text in documents(span, corpus, Report())]
    trained = tokenizer.train_tokenizer(TokenizerConfig(kind="bpe", vocab_size=VOCABULARY), texts)
    assert (trained.vocab_size, trained.end_of_text) == (VOCABULARY, END)
    return trained


@contextmanager
def registered() -> Iterator[str]:
    """Start Ray, and register the model as champion in a new MLflow store. Yield the address of the store."""
    import mlflow
    import ray

    entry.prepare_libraries()
    with tempfile.TemporaryDirectory(prefix="gru-benchmark-") as temporary:
        directory = Path(temporary)
        uri = f"sqlite:///{directory / 'mlflow.db'}"
        mlflow.set_tracking_uri(uri)
        mlflow.MlflowClient().create_experiment(NAME, artifact_location=str(directory / "artifacts"))
        write_bundle(str(directory / "bundle"), MODEL, model().state_dict(), train_tokenizer(), LINEAGE)
        run = tracking.open_run(NAME, "key", "promote")
        version = versions.register(run, NAME, str(directory / "bundle"), 2.0, "text")
        mlflow.MlflowClient().set_registered_model_alias(NAME, versions.CHAMPION, version.version)
        ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False)
        try:
            yield uri
        finally:
            ray.shutdown()


def url_of(port: int) -> str:
    return f"http://127.0.0.1:{port}"


def serve(uri: str, port: int, slots: int) -> str:
    """Deploy the model with `slots` slots per replica. Return the URL of the endpoint."""
    config = ServeConfig(port=port, slots=slots, max_queue=2 * slots, max_tokens_in_flight=1 << 30)
    deployment.deploy(config, ServeResources(), NAME, uri, "")
    url = url_of(port)
    deployment.wait_ready(url, "1", 120)
    load(throughput, url, 8, 20)  # warms up
    return url


def serve_constant(tokens_per_event: int, pause: float = 0) -> str:
    """Deploy an app that computes nothing, and return its path. It sends as many events as the endpoint would, with a
    pause in seconds after each."""
    from fastapi import FastAPI
    from fastapi.responses import StreamingResponse
    from ray import serve

    app = FastAPI()

    @app.post("/v1/completions")
    async def completions(body: dict[str, Any]) -> StreamingResponse:
        choice = {"index": 0, "text": "text " * tokens_per_event, "logprobs": None, "finish_reason": None}
        event = f"data: {json.dumps({'id': 'cmpl-0', 'object': 'text_completion', 'choices': [choice]})}\n\n"
        usage = {"choices": [], "usage": {"completion_tokens": body["max_tokens"]}}

        async def events() -> AsyncIterator[str]:
            for _ in range(body["max_tokens"] // tokens_per_event):
                yield event
                await asyncio.sleep(pause)
            yield f"data: {json.dumps(usage)}\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    constant = serve.deployment(max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 0.5})(
        serve.ingress(app)(type("Constant", (), {}))
    )
    serve.run(constant.bind(), name="constant", route_prefix="/constant")
    return "/constant"


def replica(app: str) -> int:
    """Return the process id of an app's newest replica."""
    processes = list(psutil.process_iter(["cmdline", "create_time"]))
    replicas = [each for each in processes if f"ServeReplica:{app}:" in " ".join(each.info["cmdline"] or ())]
    return max(replicas, key=lambda each: each.info["create_time"]).pid


def http(uri: str, port: int, alone: float) -> None:
    """Print the tokens/s of the endpoint, of the engine alone, and of an app that computes nothing."""
    url = serve(uri, port, STREAMS)
    ours = max((load(throughput, url, STREAMS, 400) for _ in range(2)), key=lambda rates: rates["tokens/s"])
    size = max(1, round(ours["tokens per event"]))
    constant = load(throughput, url + serve_constant(size), STREAMS, 4000)["tokens/s"]
    sides = f"{ours['tokens/s']:,.0f}, engine alone {alone:,.0f}, constant text {constant:,.0f}"
    show(f"HTTP, {STREAMS} streams, tokens/s", sides, ours["tokens/s"] / min(alone, constant))


def first(uri: str, port: int) -> None:
    """Print the time to the first token of the endpoint, and of an app that computes nothing in about that time."""
    url, clients, seconds = serve(uri, port, STREAMS), 32, 30
    idle, busy = (load(first_tokens, url, clients, seconds, long_prompt) for long_prompt in (False, True))
    constant = load(first_tokens, url + serve_constant(4, pause=0.0125), clients, seconds, False)
    p50, p99 = 1e3 * idle["p50"], 1e3 * idle["p99"]
    show(f"first token, {clients} clients, ms", f"p99 {p99:.0f}, p50 {p50:.0f}", p99 / p50)
    show("", f"p50 {p50:.0f}, constant text {1e3 * constant['p50']:.0f}", idle["p50"] / constant["p50"])
    show("", f"p99 beside 100,000-token prompts {1e3 * busy['p99']:.0f}, without {p99:.0f}", busy["p99"] / idle["p99"])


def open_at_once(uri: str, port: int) -> None:
    """Print by how much open streams make a replica grow, of the endpoint and of an app that computes nothing."""
    url, streams = serve(uri, port, 2048), 2000
    ours = load(open_streams, url, streams, replica(deployment.APP))["MB"]
    url += serve_constant(4, pause=3)
    theirs = load(open_streams, url, streams, replica("constant"))["MB"]
    sides = f"the replica grew by {ours:.0f} MB, that of constant text by {theirs:.0f}; {ours - theirs:.0f} MB more"
    show(f"{streams:,} open streams", sides, ours / theirs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("engine", "http", "first", "streams", "llama")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="parts to run")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="earlier version of this repository")
    arguments = parser.parse_args()
    only = set(arguments.only)
    alone = engine(arguments.against) if {"engine", "http"} & only else math.nan
    if only == {"engine"}:
        return
    with registered() as uri:
        port = free_port()
        if "http" in only:
            http(uri, port, alone)
        if "first" in only:
            first(uri, port)
        if "streams" in only:
            open_at_once(uri, port)
        if "llama" in only:
            try:
                from tests.benchmarks import llama
            except ImportError as missing:
                print(f"llama-server is not measured, since the extra `llama` is not installed: {missing}")
                return
            llama.compare(serve(uri, port, STREAMS), train_tokenizer())


if __name__ == "__main__":
    main()
