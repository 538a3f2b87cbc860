"""Addresses as other hosts see them: which address to announce, and why an address can't be reached.

Responsible for: the address that a coordinator which listens on all interfaces advertises, and for explaining
why this process can't reach an address. Rule: every network check is bounded in time, except for the
resolver's own timeout. Must not open a connection that stays open.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from fcluster.common.endpoints import split_address

CONNECT_TIMEOUT_S = 2.0
PATIENCE_S = 2.0
REMEDY = (
    "Check that the coordinator runs and that its port is open to this host. If this host has to use "
    "another name or address for it, set coordinator.advertised.address on the coordinator's host."
)
_ANY = ("0.0.0.0", "*", "::", "[::]")


@dataclass(frozen=True)
class Announced:
    """The address that other processes are told, and a warning if they may not be able to use it (otherwise
    empty).
    """

    address: str
    warning: str = ""


def announced_address(bound: str, advertised: str, brokers: str) -> Announced:
    """The address that a coordinator that listens at `bound` announces.

    Args:
        bound: ``tcp://host:port`` in use. A host that stands for all interfaces is useless to others.
        advertised: the setting `coordinator.advertised.address`: ``host`` or ``host:port``. Empty if not set.
        brokers: bootstrap servers. If the host's own name is useless, the address is used from which this
            host reaches the brokers: a process that reaches them can most likely reach that address too.
    """
    host, port = split_address(bound)
    if advertised:
        wanted, wanted_port = split_address(advertised)
        return Announced(_tcp(wanted, wanted_port or port))
    if host not in _ANY:
        return Announced(bound)
    name = socket.gethostname()
    if any(not _is_loopback(found) for found in _addresses_of(name)):
        return Announced(_tcp(name, port))
    own = _own_address_towards(brokers)
    if own:
        return Announced(_tcp(own, port))
    return Announced(
        _tcp(name, port),
        f"workers on other hosts are told tcp://{name}:{port}, but the name {name} doesn't resolve to a "
        "reachable address: set coordinator.advertised.address to a name or address of this host that "
        "they can reach",
    )


def trouble_reaching(address: str, timeout_s: float = CONNECT_TIMEOUT_S) -> str:
    """Why connecting to ``tcp://host:port`` fails; empty if it works. Takes at most `timeout_s`, plus the
    time that the resolver takes for a name.
    """
    host, port = split_address(address)
    try:
        socket.create_connection((host, int(port)), timeout_s).close()
    except socket.gaierror:
        return f"can't resolve the name {host!r} here"
    except ConnectionRefusedError:
        return f"nothing listens at {host}:{port}"
    except TimeoutError:
        return (
            f"{host}:{port} doesn't answer: the host is down, or a firewall or a missing route blocks the way"
        )
    except (OSError, ValueError, OverflowError) as error:
        return f"can't reach {host}:{port}: {getattr(error, 'strerror', None) or error}"
    return ""


class ReachWatch:
    """Finds out why a wanted connection can't be established, independently of the code that tries it. May be
    used from any thread.

    Args:
        say: called with the reason, in its own thread, if an address isn't reached in time.
        patience_s: how long that time is.
    """

    def __init__(self, say: Callable[[str], None], patience_s: float = PATIENCE_S) -> None:
        self._say = say
        self._patience_s = patience_s
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None

    def expect(self, address: str) -> None:
        """A connection to `address` is being established. It replaces the former one."""
        timer = threading.Timer(self._patience_s, self._look, (address,))
        timer.daemon = True
        with self._lock:
            former, self._timer = self._timer, timer
        if former is not None:
            former.cancel()
        timer.start()

    def met(self) -> None:
        """The connection is open, or no longer wanted."""
        with self._lock:
            former, self._timer = self._timer, None
        if former is not None:
            former.cancel()

    def _look(self, address: str) -> None:
        trouble = trouble_reaching(address)
        with self._lock:
            wanted = self._timer is threading.current_thread()
        if trouble and wanted:
            self._say(f"no connection to the coordinator at {address}: {trouble}; retrying. {REMEDY}")


def _tcp(host: str, port: str) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def _addresses_of(name: str) -> Iterable[str]:
    try:
        return {str(found[4][0]) for found in socket.getaddrinfo(name, None, socket.AF_INET)}
    except OSError:
        return ()


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def _own_address_towards(brokers: str) -> str:
    """The address from which this host reaches the first broker that isn't on its own loopback. Empty if
    there is none.
    """
    for broker in brokers.split(","):
        host, port = split_address(broker.strip())
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.connect((host, int(port or 9092)))  # this sends nothing
                own = str(probe.getsockname()[0])
        except (OSError, ValueError, OverflowError):
            continue
        if not _is_loopback(own):
            return own
    return ""
