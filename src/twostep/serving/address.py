"""Where a server listens."""

from __future__ import annotations

import socket
from ipaddress import ip_address

from twostep.errors import InputError

LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it."""
    try:
        return host == "localhost" or ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A bound socket.

    Args:
        port: 0 for a free one.

    Raises:
        InputError: if the address cannot be listened on.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        where = f"{host}:{port}"
        raise InputError(f"--port: {where} cannot be listened on: {error.strerror}") from error
    return listening


def url_of(host: str, listening: socket.socket) -> str:
    """The address that a browser takes."""
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{listening.getsockname()[1]}"
