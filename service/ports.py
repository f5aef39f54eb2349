"""Ports to listen on: bound early, told apart by their numbers, kept for several processes."""

import contextlib
import socket
from collections.abc import Iterator

from service.errors import CannotListen, InvalidSettings


def bind(host: str, port: int, *, is_shared: bool = False) -> socket.socket:
    """A socket that is bound, but refuses connections until the application has started; `is_shared`: others
    of this user may be bound there that say the same. Raises CannotListen."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if is_shared:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise CannotListen(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    return bound


def check_ports(main: socket.socket, admin: socket.socket) -> None:
    """Raises InvalidSettings when they have one number, by which the planes are told apart."""
    if (port := port_of(main)) == port_of(admin):
        main.close()
        admin.close()
        raise InvalidSettings(f"main and admin port are both {port}: they need two, on two addresses, too")


def port_of(bound: socket.socket) -> int:
    port: int = bound.getsockname()[1]
    return port


@contextlib.contextmanager
def held(host: str, port: int) -> Iterator[int]:
    """Keep a port, without listening, for sockets of ours that share it; its number.

    Raises CannotListen where anybody else listens on it or keeps it.
    """
    with bind(host, port) as alone:
        number = port_of(alone)
    with bind(host, number, is_shared=True) as kept:
        # From now on an address in use to everybody who does not share it, although nobody listens yet.
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        yield number
