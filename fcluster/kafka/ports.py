"""Ports on this machine that stay with their owner, even while no process listens on them.

Responsible for: choosing every port of fcluster and its tests that other processes are told. A port that was
free a moment ago isn't ours: another program may take it while our process is down, and clients that still
use it would then get that program's answers. So a port that has to stay the same is reserved.

Invariants:
- Reserved ports are outside the range from which the system takes ports for outgoing connections and for "any
  free port" (port 0), as far as there is room outside it.
- A reservation is a file named after the port, in a registry of this user. It lasts as long as its owner. An
  owner is a directory (`reserve_for_directory`), while it exists, even if the broker there is stopped; or a
  process (`reserve_for_process`), which holds a lock on the file, so the reservation ends with it however it
  ends.
- Without a registry (a read-only home), ports are still chosen outside that range and checked to be free.

Must not be used for ports that other processes learn only after they are bound: use port 0 for those.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import socket
import zlib
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from fcluster.common.errors import FclusterError

__all__ = ["NoFreePort", "is_free", "reserve_for_directory", "reserve_for_process"]

BROKER_PORTS: Final = range(20_000, 30_000)
"""Ports of embedded brokers."""
PROCESS_PORTS: Final = range(12_000, 20_000)
"""Ports of coordinators, and of processes that tests start."""
_EPHEMERAL_RANGE_FILE: Final = Path("/proc/sys/net/ipv4/ip_local_port_range")

_held: list[int] = []
"""Descriptors of the locked reservation files of this process. The system closes them when it exits."""


class NoFreePort(FclusterError):  # noqa: N818
    """There is no free port."""


def reserve_for_directory(directory: Path, count: int, wanted: Sequence[int] = ()) -> list[int]:
    """Free ports that belong to `directory` while it exists. Its previous ports are released.

    Args:
        directory: the directory of a broker, or of a cluster of brokers. It must exist.
        count: how many ports.
        wanted: the ports to use if there are `count` of them and all are free, for example those of the last
            run.

    Raises:
        NoFreePort: too few are free.
    """
    owner = os.fsencode(directory.absolute())
    with _registry() as registry:
        if len(wanted) == count and all(_can_take(registry, port, owner) for port in wanted):
            ports = list(wanted)
        else:
            ports = _choose(registry, BROKER_PORTS, count, owner)
        if registry is not None:
            for file in _reservations(registry):
                if int(file.name) not in ports and _owner_of(file) == owner:
                    file.unlink(missing_ok=True)
            for port in ports:
                (registry / str(port)).write_bytes(owner)
    return ports


def reserve_for_process() -> int:
    """A free port that belongs to this process until it ends.

    Raises:
        NoFreePort: none is free.
    """
    with _registry() as registry:
        (port,) = _choose(
            registry, PROCESS_PORTS, 1, b"process %d %s" % (os.getpid(), os.urandom(4).hex().encode())
        )
        if registry is not None:
            held = os.open(registry / str(port), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            _held.append(held)
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return port


def is_free(port: int) -> bool:
    """Whether a server could listen on the port now, on the loopback interface and on all interfaces."""
    for address in ("127.0.0.1", ""):
        with socket.socket() as probe:
            # Bound as servers do it, so lingering connections of the last run don't count.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
            except OSError:
                return False
    return True


def ephemeral_ports() -> range:
    """The ports that the system hands out for "any free port"."""
    try:
        first, last = map(int, _EPHEMERAL_RANGE_FILE.read_text().split())
    except (OSError, ValueError):
        return range(32_768, 65_536)  # macOS: from 49,152 on
    return range(first, last + 1)


# --- choosing ----------------------------------------------------------------------------------------


def _choose(registry: Path | None, among: range, count: int, seed: bytes) -> list[int]:
    """Free ports, starting at a number that depends on `seed`. Reserved ones only if there are no others."""
    ephemeral = ephemeral_ports()
    start = zlib.crc32(seed) % len(among)
    order = [among[(start + step) % len(among)] for step in range(len(among))]
    order.sort(key=lambda port: port in ephemeral)
    found: list[int] = []
    for may_be_reserved in (False, True):
        for port in order:
            if len(found) == count:
                return found
            reserved = registry is not None and _is_reserved(registry / str(port), seed)
            if port not in found and reserved <= may_be_reserved and is_free(port):
                found.append(port)
    if len(found) == count:
        return found
    raise NoFreePort(
        f"fewer than {count} ports between {among[0]} and {among[-1]} are free on this machine",
        remedy="Stop some programs that listen on these ports.",
    )


def _can_take(registry: Path | None, port: int, owner: bytes) -> bool:
    return is_free(port) and (registry is None or not _is_reserved(registry / str(port), owner))


# --- the registry ------------------------------------------------------------------------------------


@contextmanager
def _registry() -> Generator[Path | None]:
    """The registry's directory, private to this user. None if there can't be one."""
    from fcluster.kafka.jars import cache_dir

    with contextlib.ExitStack() as closing:
        try:
            registry = cache_dir() / "ports"
            registry.mkdir(parents=True, exist_ok=True)
            lock = closing.enter_context((registry / "lock").open("ab"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        except (OSError, RuntimeError):  # a read-only home, or none
            yield None
            return
        yield registry


def _reservations(registry: Path) -> list[Path]:
    return [file for file in registry.iterdir() if re.fullmatch(r"[0-9]{1,5}", file.name)]


def _owner_of(file: Path) -> bytes:
    """The directory for which the port is reserved. Empty if the owner isn't a directory, or if there is no
    reservation.
    """
    try:
        return file.read_bytes()
    except OSError:
        return b""


def _is_reserved(file: Path, owner: bytes) -> bool:
    """Whether another owner has the port. Removes a reservation whose owner no longer exists."""
    try:
        with file.open("rb") as opened:
            try:
                fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    return True
                raise
            directory = opened.read()
    except OSError:
        return False
    if directory == owner:
        return False
    if directory and Path(os.fsdecode(directory)).is_dir():
        return True
    file.unlink(missing_ok=True)
    return False
