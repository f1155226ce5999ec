"""Clients of an endpoint with OpenAI's interface that measure it: throughput, open streams, time to the first token."""

import asyncio
import json
import multiprocessing
import statistics
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import aiohttp
import psutil

PROMPT = "def read(path):\n"
TIMEOUT = aiohttp.ClientTimeout(total=900)
OPEN_SECONDS = 10.0  # for which all streams are open


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


async def throughput(url: str, streams: int, tokens: int, fields: dict[str, Any] | None = None) -> dict[str, float]:
    """Measure the tokens/s of concurrent completions, and the mean number of tokens per event.

    fields: of the requests, beside those that all endpoints need. Raises RuntimeError if a stream ends early.
    """

    async def one(session: aiohttp.ClientSession) -> tuple[int, int]:
        events = tokens_received = 0
        async for event in stream(session, url, request(tokens, **(fields or {}))):
            events += 1
            tokens_received += (event.get("usage") or {}).get("completion_tokens", 0)
        return events, tokens_received

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=TIMEOUT) as session:
        started = time.perf_counter()
        counts = await asyncio.gather(*(one(session) for _ in range(streams)))
        seconds = time.perf_counter() - started
    events, tokens_received = (sum(column) for column in zip(*counts, strict=True))
    if tokens_received != streams * tokens:
        raise RuntimeError(f"{url} generated {tokens_received:,} tokens instead of {streams * tokens:,}")
    return {"tokens/s": tokens_received / seconds, "tokens per event": tokens_received / max(1, events)}


async def open_streams(url: str, streams: int, process: int) -> dict[str, float]:
    """Measure by how many MB a process grows until so many streams are open at the same time.

    Raises RuntimeError if a stream ends before. The clients go away then.
    """
    memory = psutil.Process(process).memory_info
    before, opened, all_opened = memory().rss, 0, asyncio.Event()

    async def one(session: aiohttp.ClientSession) -> None:
        nonlocal opened
        async with aclosing(stream(session, url, request(4000))) as events:
            await anext(events)
            opened += 1
            if opened == streams:
                all_opened.set()
            async for _ in events:
                pass

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=TIMEOUT) as session:
        clients = [asyncio.ensure_future(one(session)) for _ in range(streams)]
        measuring = asyncio.ensure_future(all_opened.wait())
        ended, _ = await asyncio.wait([measuring, *clients], return_when=asyncio.FIRST_COMPLETED)
        if measuring in ended:
            ended, _ = await asyncio.wait(clients, timeout=OPEN_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        grown = memory().rss - before
        for client in (measuring, *clients):
            client.cancel()
        outcomes = await asyncio.gather(*clients, return_exceptions=True)
    if ended:
        reason = next((each for each in outcomes if isinstance(each, Exception)), None)
        raise RuntimeError(f"a stream ended before {streams:,} were open: only {opened:,} had begun") from reason
    return {"MB": grown / 1e6}


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
