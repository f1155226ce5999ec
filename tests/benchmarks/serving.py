"""Speed of the endpoint: the engine compared with its matrix products alone, in bf16 with fp32, and with an earlier
version; HTTP compared with the engine and with a Serve app that computes nothing. All run on this machine, the clients
included.

python -m tests.benchmarks.serving [--only engine http streams first] [--against CHECKOUT]
"""

import argparse
import asyncio
import json
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import torch

from gru.config import CorpusConfig, ModelConfig, ServeConfig, ServeResources, TokenizerConfig
from gru.corpus import tokenizer
from gru.corpus.documents import documents
from gru.corpus.listing import list_files
from gru.corpus.partitions import plan
from gru.corpus.report import Report
from gru.generation.engine import Engine
from gru.generation.generate import Collector
from gru.generation.request import Request
from gru.generation.sampling import SamplingParams
from gru.model.inference import inference_model
from gru.model.language_model import GRULanguageModel
from gru.network import free_port
from gru.registry import tracking, versions
from gru.registry.bundle import write_bundle
from gru.serving import deployment
from jobs import entry
from tests.gru.registry.bundles import LINEAGE

MODEL = ModelConfig(embedding=512, hidden=512, layers=2)
VOCABULARY = 2048
END = VOCABULARY - 1
STREAMS = 64
TRIALS = 4
NAME = "benchmark"
PROMPT = "def read(path):\n"
TIMEOUT = aiohttp.ClientTimeout(total=900)


def show(what: str, sides: str, ratio: float | None = None) -> None:
    """Print the numbers of two or more sides, and a ratio."""
    print(f"{what:34} {sides}" + ("" if ratio is None else f": {ratio:.2f} x"), flush=True)


def model() -> GRULanguageModel:
    """Return a model that never generates the end-of-text id."""
    torch.manual_seed(0)
    endless = GRULanguageModel(MODEL, VOCABULARY).eval().requires_grad_(False)
    endless.output_bias[END] = -100
    return endless


# The engine alone


def engine_rate(streams: int, tokens: int, bf16_products: bool = True) -> float:
    """Return the tokens/s of `streams` concurrent streams."""
    engine = Engine(inference_model(model(), bf16_products=bf16_products), END, streams, streams)
    collectors = [Collector() for _ in range(streams)]
    started = time.perf_counter()
    for seed, collector in enumerate(collectors):
        engine.submit(Request([1], SamplingParams(seed), tokens, collector))
    for collector in collectors:
        collector.wait()
    rate = streams * tokens / (time.perf_counter() - started)
    engine.close()
    engine.join()
    return rate


def products_rate(streams: int) -> float:
    """Return the tokens/s of the matrix products of a step alone."""
    width, hidden = MODEL.embedding, MODEL.hidden
    x, h = torch.randn(streams, width), torch.randn(streams, hidden)
    matrices = [(torch.randn(width, 3 * hidden), torch.randn(hidden, 3 * hidden)) for _ in range(MODEL.layers)]
    output = torch.randn(width, VOCABULARY)
    best = math.inf
    for _ in range(200):
        started = time.perf_counter()
        for from_x, from_h in matrices:
            torch.mm(x, from_x)
            torch.mm(h, from_h)
        torch.mm(x, output)
        best = min(best, time.perf_counter() - started)
    return streams / best


def rate_of(checkout: Path, streams: int, tokens: int) -> float:
    """Return the tokens/s of the engine in another checkout of this repository."""
    code = (
        "import torch; from tests.benchmarks import serving; "
        f"torch.set_num_threads(1); print(serving.engine_rate({streams}, {tokens}))"
    )
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve())}
    done = subprocess.run(command, cwd=checkout, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout)


def engine(against: Path | None) -> float:
    """Print the tokens/s of the engine, the best of several alternating trials. Return those of many streams."""
    torch.set_num_threads(deployment.THREADS)
    with torch.inference_mode():
        bound = products_rate(STREAMS)
    best: dict[int, float] = {}
    for streams, tokens in ((STREAMS, 150), (1, 500)):
        sides: dict[str, Callable[[], float]] = {
            "engine": partial(engine_rate, streams, tokens),
            "products in fp32": partial(engine_rate, streams, tokens, bf16_products=False),
        }
        if against:
            sides["earlier version"] = partial(rate_of, against, streams, tokens)
        rates = [{side: measure() for side, measure in sides.items()} for _ in range(TRIALS)]
        fastest = {side: max(trial[side] for trial in rates) for side in sides}
        best[streams] = fastest.pop("engine")
        for side, rate in fastest.items():
            what = f"engine, 2 x 512, streams: {streams}"
            show(what, f"tokens/s {best[streams]:,.0f}, {side} {rate:,.0f}", best[streams] / rate)
    many, one = best[STREAMS], best[1]
    show("", f"{STREAMS} streams {many:,.0f}, 1 stream {one:,.0f}", many / one)
    show("", f"{STREAMS} streams {many:,.0f}, matrix products alone {bound:,.0f}", many / bound)
    return many


# Over HTTP


async def stream(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """Yield the events of one streamed completion. Raises RuntimeError if one of them is an error."""
    async with session.post(f"{url}/v1/completions", json={**body, "stream": True}) as response:
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {await response.text()}")
        async for line in response.content:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(event["error"]["message"])
                yield event


def request(tokens: int, **fields: Any) -> dict[str, Any]:
    """Return the body of a completion request."""
    return {"prompt": PROMPT, "max_tokens": tokens, "stream_options": {"include_usage": True}, **fields}


async def throughput(url: str, streams: int, tokens: int) -> dict[str, float]:
    """Measure the tokens/s of concurrent completions, and the mean number of tokens per event."""

    async def one(session: aiohttp.ClientSession) -> tuple[int, int]:
        events = tokens_received = 0
        async for event in stream(session, url, request(tokens)):
            events += 1
            tokens_received += (event.get("usage") or {}).get("completion_tokens", 0)
        return events, tokens_received

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=TIMEOUT) as session:
        started = time.perf_counter()
        counts = await asyncio.gather(*(one(session) for _ in range(streams)))
        seconds = time.perf_counter() - started
    events, tokens_received = (sum(column) for column in zip(*counts, strict=True))
    return {"tokens/s": tokens_received / seconds, "tokens per event": tokens_received / max(1, events)}


async def open_streams(url: str, streams: int, tokens: int) -> dict[str, float]:
    """Open streams, and count how many of them start and fail, and whether all of them are open at the same time."""
    started, all_started, failed = 0, asyncio.Event(), 0

    async def one(session: aiohttp.ClientSession) -> None:
        nonlocal started, failed
        counted = False
        try:
            async for _ in stream(session, url, request(tokens)):
                if not counted:
                    started, counted = started + 1, True
                    if started == streams:
                        all_started.set()
            failed += not counted
        except Exception as error:
            failed += 1
            print(f"a stream failed: {error!r}", file=sys.stderr)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=TIMEOUT) as session:
        await asyncio.gather(*(one(session) for _ in range(streams)))
    return {"started": started, "failed": failed, "all at once": float(all_started.is_set())}


async def first_tokens(url: str, clients: int, seconds: float, long_prompt: bool) -> dict[str, float]:
    """Measure the seconds until the first token, for clients that send one request after another.

    long_prompt: prompts of 100,000 tokens are read at the same time.
    """
    times: list[float] = []
    until = time.perf_counter() + seconds

    async def one(session: aiohttp.ClientSession, client: int) -> None:
        await asyncio.sleep(client * 0.05)
        while time.perf_counter() < until:
            started, first = time.perf_counter(), None
            async for _ in stream(session, url, request(60)):
                if first is None:
                    first = time.perf_counter() - started
                    times.append(first)

    async def reader(session: aiohttp.ClientSession) -> None:
        while time.perf_counter() < until:
            async for _ in stream(session, url, request(1, prompt=" x" * 100_000, user=str(time.time()))):
                pass

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=TIMEOUT) as session:
        reading = asyncio.ensure_future(reader(session)) if long_prompt else None
        await asyncio.gather(*(one(session, client) for client in range(clients)))
        if reading:
            reading.cancel()
    return {"p50": statistics.median(times), "p99": statistics.quantiles(times, n=100)[98], "requests": len(times)}


def load(measure: Callable[..., Any], *arguments: Any) -> dict[str, float]:
    """Run clients in a separate process, as outside of a benchmark."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_load, (measure, arguments))


def _load(measure: Callable[..., Any], arguments: tuple[Any, ...]) -> dict[str, float]:
    return asyncio.run(measure(*arguments))


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
        corpus = CorpusConfig(sources=["python-stdlib"])
        [partition, *_] = plan(list_files(corpus).files, corpus)
        texts = [text for span in partition[:100] for text in documents(span, corpus, Report())]
        trained = tokenizer.train_tokenizer(TokenizerConfig(kind="bpe", vocab_size=VOCABULARY), texts)
        assert (trained.vocab_size, trained.end_of_text) == (VOCABULARY, END)
        write_bundle(str(directory / "bundle"), MODEL, model().state_dict(), trained, LINEAGE)
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


def replica_memory(app: str) -> float:
    """Return the memory in MB of the replica's process."""
    replicas = [p for p in psutil.process_iter(["cmdline"]) if f"ServeReplica:{app}:" in " ".join(p.info["cmdline"])]
    return max(process.memory_info().rss for process in replicas) / 1e6


def growth(app: str, url: str, streams: int, tokens: int) -> tuple[float, float]:
    """Return how many of the open streams failed, and by how many MB the replica grew."""
    before = replica_memory(app)
    counts = load(open_streams, url, streams, tokens)
    return counts["failed"], replica_memory(app) - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("engine", "http", "streams", "first")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="parts to run")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="earlier version of this repository")
    arguments = parser.parse_args()
    only = arguments.only
    alone = engine(arguments.against) if {"engine", "http"} & set(only) else math.nan
    if set(only) == {"engine"}:
        return
    with registered() as uri:
        port = free_port()
        if "http" in only:
            url = serve(uri, port, STREAMS)
            ours = max((load(throughput, url, STREAMS, 400) for _ in range(2)), key=lambda rates: rates["tokens/s"])
            size = max(1, round(ours["tokens per event"]))
            constant = load(throughput, url + serve_constant(size), STREAMS, 4000)["tokens/s"]
            sides = f"{ours['tokens/s']:,.0f}, engine alone {alone:,.0f}, constant text {constant:,.0f}"
            show(f"HTTP, {STREAMS} streams, tokens/s", sides, ours["tokens/s"] / min(alone, constant))
        if "first" in only:
            url = serve(uri, port, STREAMS)
            idle = load(first_tokens, url, 32, 30, False)
            busy = load(first_tokens, url, 32, 30, True)
            show(
                "first token, 32 clients, ms",
                f"p50 {1e3 * idle['p50']:.0f}, p99 {1e3 * idle['p99']:.0f}",
                idle["p99"] / idle["p50"],
            )
            show(
                "  p99 beside 100,000-token prompts",
                f"{1e3 * busy['p99']:.0f}, without {1e3 * idle['p99']:.0f}",
                busy["p99"] / idle["p99"],
            )
        if "streams" in only:
            failed, ours = growth("gru", serve(uri, port, 2048), 2000, 40)
            _, theirs = growth("constant", url_of(port) + serve_constant(4, pause=3), 2000, 40)
            show(
                "2,000 open streams",
                f"{failed:.0f} failed; the replica grew by {ours:.0f} MB, constant text {theirs:.0f}",
                ours / theirs,
            )


if __name__ == "__main__":
    main()
