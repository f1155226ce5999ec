import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from gru.errors import UserError
from gru.network import OWNER_VARIABLE, free_port, is_local_address, require_bindable, url_of

OPTION = "--set serve.port=PORT"
FIRST_UNPRIVILEGED = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")


def refusal(host: str, port: int) -> str:
    with pytest.raises(UserError) as caught:
        require_bindable(host, port, OPTION)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_free_port_is_bindable() -> None:
    require_bindable("127.0.0.1", free_port(), OPTION)
    require_bindable("localhost", free_port(), OPTION)


def test_addresses_of_ipv6_work_and_have_brackets_in_urls() -> None:
    require_bindable("::1", free_port(), OPTION)
    assert is_local_address("::1") and not is_local_address("2001:db8::1")
    assert refusal("2001:db8::1", 8000).startswith("2001:db8::1 is not an address of this machine")
    assert url_of("::1", 80) == "http://[::1]:80" and url_of("localhost", 80) == "http://localhost:80"


def test_a_port_in_use_is_named_with_its_option() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        name = psutil.Process().name()
        assert refusal("127.0.0.1", port) == (
            f"port {port} is in use by {name} (process {os.getpid()}): choose another with {OPTION}"
        )


LISTEN = """
import socket, subprocess, sys
if sys.argv[1:] == ["child"]:
    server = socket.socket()
    server.bind(("127.0.0.1", 0))
    server.listen()
    print(server.getsockname()[1], flush=True)
    sys.stdin.readline()
else:
    subprocess.run([sys.executable, "-c", sys.argv[1], "child"], env={})  # as Ray's workers, whose own is overwritten
"""


def test_a_port_of_embedded_services_is_named_with_their_storage() -> None:
    command = [sys.executable, "-c", LISTEN, LISTEN]
    environment = {**os.environ, OWNER_VARIABLE: "/x/store"}
    with subprocess.Popen(
        command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as service:
        assert service.stdout is not None
        port = int(service.stdout.readline())
        user = "the embedded services of /x/store, which `gru down /x/store` stops"
        assert refusal("127.0.0.1", port) == f"port {port} is in use by {user}: choose another with {OPTION}"
        service.communicate("end")


@pytest.mark.skipif(
    os.geteuid() == 0 or int(FIRST_UNPRIVILEGED.read_text()) <= 80, reason="this process may bind to port 80"
)
def test_a_privileged_port_needs_root() -> None:
    assert refusal("127.0.0.1", 80) == f"port 80 needs root: choose one >= 1024 with {OPTION}"


@pytest.mark.parametrize("code", ["EACCES", "EPERM"])
def test_a_refused_permission_is_not_called_in_use(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    import errno

    def bind(self: socket.socket, address: object) -> None:
        raise OSError(getattr(errno, code), "refused")

    monkeypatch.setattr(socket.socket, "bind", bind, raising=False)
    assert refusal("127.0.0.1", 80) == f"port 80 needs root: choose one >= 1024 with {OPTION}"


def test_a_foreign_address_is_named() -> None:
    assert refusal("192.0.2.1", 8000).startswith("192.0.2.1 is not an address of this machine: choose one that is")


def test_a_name_that_does_not_resolve_is_named() -> None:
    assert re.match(
        r"nowhere\.invalid does not resolve to an IPv4 address \(.+\): choose", refusal("nowhere.invalid", 1)
    )


def test_addresses_of_this_machine_are_known() -> None:
    assert is_local_address("127.0.0.1") and is_local_address("0.0.0.0")
    assert not is_local_address("192.0.2.1") and not is_local_address("nowhere.invalid")
