"""The limits of Serve's HTTP proxies, in uvicorn as they run it: headers, slow clients, many connections, memory."""

import asyncio
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from starlette.types import Receive, Scope, Send

from gru import ray_internals
from gru.serving import deployment, http_limits
from gru.serving.http_limits import LimitedProtocol, ProxyMiddleware, readable_headers
from tests.gru.serving.server import listening, wait_until

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
requests: list[tuple[str, bytes]] = []  # path and body of those that reached the application


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with the body's size; `/later` later, `/stream` with 20 parts in a second, `/much` with 32 MB first.

    `/until-gone` is not answered: it ends when its client has gone.
    """
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body, more = body + message["body"], message["more_body"]
    requests.append((scope["path"], body))
    if scope["path"] == "/later":
        await asyncio.sleep(0.5)
    if scope["path"] == "/until-gone":
        while (await receive())["type"] != "http.disconnect":
            pass
        requests.append(("/gone", b""))
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    if scope["path"] == "/stream":
        for part in range(20):
            await send({"type": "http.response.body", "body": b"%d " % part, "more_body": True})
            await asyncio.sleep(0.05)
    if scope["path"] == "/much":
        for _ in range(500):  # 32 MB, more than sockets buffer
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
    await send({"type": "http.response.body", "body": json.dumps({"body": len(body)}).encode(), "more_body": False})


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(http_limits, "LINGER_SECONDS", 60.0)  # however long the test takes to send
    requests.clear()
    with listening(ProxyMiddleware(echo), LimitedProtocol) as url:
        yield url


def connect(url: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=30)


def read(client: socket.socket) -> bytes:
    """Return what the server sends until it closes the connection."""
    received = b""
    try:
        while part := client.recv(65536):
            received += part
    except ConnectionResetError:
        received += b"(reset)"
    return received


def error_of(answer: bytes) -> tuple[int, str]:
    """Return status and message of an answer in OpenAI's layout."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"connection: close" in head
    return int(head.split()[1]), json.loads(body)["error"]["message"]


@pytest.mark.parametrize(
    "start",
    [
        b"GET / HTTP/1.1\r\nx: ",
        b"GET /",
        b"GET / HTTP/1.1\r\nx",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\ntrailer: ",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1;extension=",
    ],
    ids=["value", "path", "name", "trailer", "extension"],
)
def test_a_header_without_end_is_431(url: str, start: bytes) -> None:
    with connect(url) as client:
        client.sendall(start + b"a" * (4 << 20))  # all of it, although the server has refused it
        status, message = error_of(read(client))
    assert status == 431 and "65,536 bytes" in message
    assert not requests


@pytest.mark.parametrize("headers", [{"x": "a" * 70_000}, {f"x-{i}": "a" for i in range(300)}], ids=["long", "many"])
def test_headers_that_arrive_at_once_are_431(url: str, headers: dict[str, str]) -> None:
    answer = httpx.get(url, headers=headers)
    assert (answer.status_code, answer.json()["error"]["type"]) == (431, "invalid_request_error")
    assert httpx.get(url, headers={"x": "a" * 60_000}).status_code == 200


def test_deploy_warns_of_a_serve_without_limits(url: str, caplog: pytest.LogCaptureFixture) -> None:
    def warnings() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name == deployment.__name__]

    deployment.warn_without_limits(url)
    assert not warnings()
    with listening(echo) as unlimited:
        deployment.warn_without_limits(unlimited)
    [message] = warnings()
    assert message.startswith(unlimited) and f"{ray_internals.PROXY_CALLBACK}={http_limits.INSTALL}" in message
    deployment.warn_without_limits(unlimited)  # nothing listens there any more
    assert len(warnings()) == 1


def test_headers_that_do_not_arrive_are_408_and_a_silent_connection_is_closed(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with connect(url) as later:
        later.sendall(GET)
        assert b"200 OK" in later.recv(65536)
        monkeypatch.setattr(http_limits, "REQUEST_SECONDS", 2.0)
        with connect(url) as slow, connect(url) as silent:
            slow.sendall(GET[:20])
            later.sendall(GET[:20])  # the second request of a connection
            assert error_of(read(slow)) == (408, "the headers did not arrive within 2 seconds")
            assert read(silent) == b""
        assert error_of(read(later))[0] == 408


def test_what_is_not_http_is_400(url: str) -> None:
    with connect(url) as client:
        client.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        assert error_of(read(client))[0] == 400


def test_a_slow_body_is_408_and_takes_no_place_in_the_application(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_limits, "BODY_SECONDS", 2.0)
    with connect(url) as slow, connect(url) as large:
        slow.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\nstart")
        large.sendall(b"POST /large HTTP/1.1\r\nHost: x\r\nContent-Length: 90000\r\n\r\n" + b"a" * 80_000)
        status = slow.recv(65536)
        assert b"408 Request Timeout" in status and b"did not arrive" in status
        assert not requests  # `large` has been passed on, and the application waits for its end
        large.sendall(b"a" * 10_000)
        assert b"200 OK" in large.recv(65536)
    assert [(path, len(body)) for path, body in requests] == [("/large", 90_000)]


def test_requests_on_one_connection_are_answered_in_order(url: str) -> None:
    with connect(url) as client:
        paths = ["/later", "/1", "/2", "/3"]
        for path in paths:
            client.sendall(GET.replace(b"/", path.encode(), 1))
        answers = b""
        while answers.count(b"HTTP/1.1 200") < len(paths):
            answers += client.recv(65536)
    assert [path for path, _ in requests] == paths
    with httpx.Client(base_url=url) as session:
        for size in (0, 10, 200_000, 0):
            assert session.post("/", content=b"a" * size).json()["body"] == size
        assert session.get("/stream").text.startswith("0 1 2 ")


def test_a_request_ends_with_its_client_whatever_was_sent_behind_it(url: str) -> None:
    with connect(url) as client:
        client.sendall(GET.replace(b"/", b"/until-gone", 1) + GET)
        wait_until(lambda: bool(requests))
    wait_until(lambda: ("/gone", b"") in requests)


def test_a_client_cannot_queue_requests_without_end(url: str) -> None:
    with connect(url) as client:
        client.sendall(GET.replace(b"/", b"/later", 1) + GET * 10_000)
        read(client)
    assert len(requests) <= 2 + http_limits.MAX_PIPELINED


def test_a_client_that_reads_nothing_is_cut_off(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_limits, "WRITE_SECONDS", 0.5)
    with connect(url) as client:
        peer = client.getsockname()[1]

        def is_open() -> bool:
            connections = psutil.Process().net_connections()
            return any(each.raddr and each.raddr.port == peer and each.status == "ESTABLISHED" for each in connections)

        wait_until(is_open)
        client.sendall(GET.replace(b"/", b"/much", 1))
        wait_until(lambda: not is_open())


def test_of_too_many_connections_the_longest_idle_is_closed(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_limits, "MAX_CONNECTIONS", 3)
    with connect(url) as busy:
        busy.sendall(GET.replace(b"/", b"/much", 1))
        received = busy.recv(65536)
        with connect(url) as idle, connect(url), connect(url):
            assert read(idle) in (b"", b"(reset)")
            assert httpx.get(url).status_code == 200  # takes the place of another idle one
        while not received.endswith(b"\r\n0\r\n\r\n"):  # who is being served is not disturbed
            received = received[-7:] + busy.recv(1 << 20)


def test_with_all_connections_in_use_a_new_one_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_limits, "MAX_CONNECTIONS", 2)
    with connect(url) as first, connect(url) as second:
        for client in (first, second):
            client.sendall(GET.replace(b"/", b"/much", 1))
            client.recv(10)
        with connect(url) as third:
            assert error_of(read(third)) == (503, "too many connections")


def test_headers_are_such_that_serve_can_read_them() -> None:
    headers = [(b"x-session-id", b"caf\xe9"), (b"x-a", "café".encode()), (b"x-request-disconnect-disabled", b"?1")]
    assert readable_headers(headers) == [(b"x-session-id", "café".encode()), (b"x-a", "café".encode())]
    for value, stays in ((b"mine-7", True), (b"caf\xe9", False), (b"no spaces", False), ("é".encode(), False)):
        assert readable_headers([(b"x-request-id", value)]) == ([(b"x-request-id", value)] if stays else [])


CHILD = """
import socket, uvicorn
from starlette.responses import PlainTextResponse
from gru.serving import http_limits
http_limits.LINGER_SECONDS = http_limits.REQUEST_SECONDS = 60.0  # however long the test takes to send
app = http_limits.ProxyMiddleware(PlainTextResponse("hello"))
server = uvicorn.Server(uvicorn.Config(app, http=http_limits.LimitedProtocol))
listener = socket.create_server(("127.0.0.1", 0), backlog=1000)
print(listener.getsockname()[1], flush=True)
server.run([listener])
"""


@pytest.fixture
def child() -> Iterator[tuple[str, Callable[[], int]]]:
    """The URL of a server in its own process, and a function for the most memory that it has had, in bytes."""
    with subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        url = f"http://127.0.0.1:{int(process.stdout.readline())}"

        def peak() -> int:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            [line] = [line for line in lines if line.startswith("VmHWM:")]
            return int(line.split()[1]) << 10

        yield url, peak
        process.terminate()


def test_large_headers_and_slow_connections_take_no_memory(child: tuple[str, Callable[[], int]]) -> None:
    url, peak = child
    wait_until(lambda: answers(url))
    before = peak()
    with ExitStack() as stack:
        slow = [stack.enter_context(connect(url)) for _ in range(500)]
        for number, client in enumerate(slow):
            client.sendall((GET if number % 2 else b"POST / HTTP/1.1\r\nContent-Length: 99\r\n\r\nslow")[:-1])
        for _ in range(3):
            with connect(url) as client:
                client.sendall(b"GET / HTTP/1.1\r\nx: ")
                for _ in range(100):
                    client.sendall(b"a" * (1 << 20))
                assert error_of(read(client))[0] == 431
        assert httpx.get(url).status_code == 200
    assert peak() - before < 30 << 20


def answers(url: str) -> Any:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        time.sleep(0.05)
        return False
