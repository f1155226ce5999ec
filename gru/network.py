"""Addresses and ports of this machine."""

import errno
import socket
from contextlib import suppress

import psutil

from gru.errors import UserError

OWNER_VARIABLE = "GRU_STORAGE"  # of a process of an embedded service: the storage that it belongs to


def url_of(host: str, port: int) -> str:
    """Return the URL of an HTTP server on this host, a name or an address of IPv4 or IPv6."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _probe(host: str) -> socket.socket:
    return socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)


def require_bindable(host: str, port: int, option: str) -> None:
    """Raise UserError if no server can listen on this host and port; `option` is what sets the port."""
    try:
        with _probe(host) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise UserError(_explain(error, host, port, option)) from None


def _explain(error: OSError, host: str, port: int, option: str) -> str:
    """Return what is wrong with the host or the port, and what to choose instead."""
    if isinstance(error, socket.gaierror):
        return f"{host} does not resolve to an IPv4 address ({error.strerror}): choose a host name or address that does"
    match error.errno:
        case errno.EADDRINUSE:
            return f"port {port} is in use by {_user_of(port)}: choose another with {option}"
        case errno.EACCES | errno.EPERM:
            return f"port {port} needs root: choose one >= 1024 with {option}"
        case errno.EADDRNOTAVAIL | errno.EAFNOSUPPORT:  # the latter on a machine without IPv6
            return (
                f"{host} is not an address of this machine: choose one that is, such as 127.0.0.1, or 0.0.0.0 for all "
                "of them"
            )
    return (
        f"cannot listen on port {port} of {host} ({error.strerror}): choose another host, or another port with {option}"
    )


def _user_of(port: int) -> str:
    """Return who listens on a port, for people, as far as this user may know."""
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if any(each.laddr.port == port and each.status == psutil.CONN_LISTEN for each in process.net_connections()):
                if store := _owner(process):
                    return f"the embedded services of {store}, which `gru down {store}` stops"
                return f"{process.name()} (process {process.pid})"
    return "another program"


def _owner(process: psutil.Process) -> str | None:
    """Return the storage whose embedded services a process belongs to; None if it belongs to none."""
    for each in (process, *process.parents()):  # Ray overwrites the environment of its workers
        with suppress(psutil.Error, OSError):
            if store := each.environ().get(OWNER_VARIABLE):
                return store
    return None


def is_local_address(host: str) -> bool:
    """Whether this name or address belongs to this machine."""
    try:
        with _probe(host) as probe:
            probe.bind((host, 0))
    except OSError:
        return False
    return True


def free_port() -> int:
    """Return a port of the loopback address on which nothing listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
