"""Makes a librdkafka producer look for a coordinator again.

A request to a group's coordinator waits in the producer until some broker of that producer goes up or down
(`rd_kafka_coord_rkb_monitor_cb`). If the coordinator has died, and the brokers' metadata no longer lists it,
nothing goes up or down. Then the request waits forever, although the group has a new coordinator (decision
0082). Adding a broker is such an event: librdkafka connects to it, finds that it already knows it, and drops
it again. The C function for that is public, but the Python client doesn't offer it. So it is called through
ctypes.

Responsible for: that one call, and for making sure that the pointer passed to it is the producer's. If that
can't be checked, the call isn't made. Must not know when a request is stuck.
"""

from __future__ import annotations

import ctypes
import functools
import random
from typing import Any, Final

from confluent_kafka import Producer, cimpl

from fcluster.common.endpoints import split_address
from fcluster.kafka.failover import accepts_connections

_POINTER_BYTES: Final = ctypes.sizeof(ctypes.c_void_p)
_NAME_CHARACTERS_MAX: Final = 100
_PRODUCER: Final = b"#producer-"
"""librdkafka's own names of producers are `CLIENT_ID#producer-NUMBER`."""


def look_again(producer: Producer, bootstrap_servers: str) -> bool:
    """Make the producer look again for coordinators that it waits for. It does that at most once a second.

    Args:
        producer: the producer. Another thread usually uses it.
        bootstrap_servers: as in its configuration. One server that accepts connections is added again.

    Returns:
        Whether the producer was told to.
    """
    library, handle = _library(), _handle_of(producer)
    if library is None or handle is None:
        return False
    servers = [server.strip() for server in bootstrap_servers.split(",")]
    for server in random.sample(servers, len(servers)):
        host, port = split_address(server)
        if port.isdigit() and accepts_connections(host, int(port)):
            library.rd_kafka_brokers_add(handle, server.encode())
            return True
    return False


@functools.cache
def _library() -> Any | None:
    """librdkafka as the Python client has loaded it. None if its functions can't be found."""
    try:
        library = ctypes.CDLL(str(cimpl.__file__))
        library.rd_kafka_name.argtypes = [ctypes.c_void_p]
        library.rd_kafka_name.restype = ctypes.c_void_p
        library.rd_kafka_brokers_add.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
        library.rd_kafka_brokers_add.restype = ctypes.c_int
    except (OSError, AttributeError):
        return None
    return library


def _handle_of(producer: Producer) -> int | None:
    """The address of librdkafka's object. None if that isn't certain.

    The Python object begins with that pointer, in all versions so far. `rd_kafka_name` returns an address
    inside the object that the pointer refers to. Reading that address through the kernel can't crash, and it
    must contain the name of a producer.
    """
    header_bytes = object.__basicsize__
    library = _library()
    if library is None or type(producer).__basicsize__ < header_bytes + _POINTER_BYTES:
        return None
    handle = ctypes.c_void_p.from_address(id(producer) + header_bytes).value
    if not handle:
        return None
    try:
        with open("/proc/self/mem", "rb", buffering=0) as memory:
            memory.seek(library.rd_kafka_name(handle))
            name = memory.read(_NAME_CHARACTERS_MAX).partition(b"\0")[0]
    except (OSError, ValueError, OverflowError):
        return None
    before, found, number = name.rpartition(_PRODUCER)
    return handle if before and found and number.isdigit() else None
