"""An S3 server in memory, which refuses every tenth request while a file `refuse` exists in its directory.

Run as a program: python store.py ADDRESS PORT
"""

import itertools
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, run_simple

BUSY = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
REFUSE_EVERY = 10

requests = itertools.count(1)
refused = 0


class QuietHandler(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        pass


def store(environment: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
    global refused
    if environment["PATH_INFO"] == "/refused":
        start("200 OK", [("Content-Type", "text/plain")])
        return [str(refused).encode()]
    if Path("refuse").exists() and next(requests) % REFUSE_EVERY == 0:
        refused += 1
        environment["wsgi.input"].read(int(environment.get("CONTENT_LENGTH") or 0))
        start("503 Slow Down", [("Content-Type", "application/xml"), ("Content-Length", str(len(BUSY)))])
        return [BUSY]
    return application(environment, start)


application = DomainDispatcherApplication(create_backend_app)

if __name__ == "__main__":
    run_simple(sys.argv[1], int(sys.argv[2]), store, threaded=True, request_handler=QuietHandler)
