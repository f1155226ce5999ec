"""Addresses and ports of this machine."""

import socket

from gru.errors import UserError


def require_bindable(host: str, port: int, option: str) -> None:
    """Raise UserError, naming the option, if another program listens on the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(f"port {port} is in use ({error.strerror}): choose another with {option}") from None


def is_local_address(host: str) -> bool:
    """Whether that name or address is one of this machine's own."""
    with socket.socket() as probe:
        try:
            probe.bind((host, 0))
        except OSError:
            return False
    return True


def free_port() -> int:
    """A port of the loopback address that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
