"""A network namespace in which a server can be cut off from its store and still be reached by its clients."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Isolated:
    """Two links lead to the namespace: one for clients, one for the store, which stands on this side of it."""

    name: str
    address: str  # of the namespace, for clients
    store_host: str  # of this side, for the store

    @property
    def command(self) -> list[str]:
        """What to put before a command that is to run in there."""
        return ["ip", "netns", "exec", self.name]

    def cut(self) -> None:
        """Drop every packet to the store from now on: no answer, no refusal, as behind a broken switch."""
        _run(*self.command, "iptables", "-A", "OUTPUT", "-d", self.store_host, "-j", "DROP")

    def heal(self) -> None:
        _run(*self.command, "iptables", "-F", "OUTPUT")


@contextmanager
def isolated() -> Iterator[Isolated]:
    """Skips the test where namespaces cannot be made."""
    number = os.getpid() % 250
    name, network = f"tosca-test-{os.getpid()}", f"10.213.{number}"
    try:
        _run("ip", "netns", "add", name)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces need root and iproute2: {error}")
    try:
        for letter, here, there in (("c", 1, 2), ("s", 5, 6)):
            outer, inner = f"tosca{number}{letter}", f"in-{letter}"
            _run("ip", "link", "add", outer, "type", "veth", "peer", "name", inner, "netns", name)
            _run("ip", "addr", "add", f"{network}.{here}/30", "dev", outer)
            _run("ip", "link", "set", outer, "up")
            _run("ip", "-n", name, "addr", "add", f"{network}.{there}/30", "dev", inner)
            _run("ip", "-n", name, "link", "set", inner, "up")
        found = Isolated(name, f"{network}.2", f"{network}.5")
        try:
            found.heal()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"dropping packets needs iptables: {error}")
        yield found
    finally:
        _run("ip", "netns", "del", name)  # its links go with it


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=30.0)
