"""Parsing of addresses in settings and messages. Pure."""

from __future__ import annotations


def split_address(address: str) -> tuple[str, str]:
    """Host and port of ``tcp://host:port``, ``host:port`` or ``host``; the port is empty if there is none."""
    rest = address.partition("://")[2] or address
    host, colon, port = rest.rpartition(":")
    if not colon or rest.endswith("]"):
        return rest.strip("[]"), ""
    return host.strip("[]"), port
