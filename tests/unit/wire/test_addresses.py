"""Which address is told to others, and why one can't be reached."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from fcluster.common.endpoints import split_address
from fcluster.common.errors import SettingsError
from fcluster.common.settings import resolve
from fcluster.kafka.ports import reserve_for_process
from fcluster.wire import addresses as reach
from fcluster.wire.addresses import ReachWatch, announced_address, trouble_reaching
from fcluster.wire.admin_client import AdminClient, CoordinatorSilent
from tests.harness import wait_until


@pytest.fixture
def listener() -> Iterator[str]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield f"tcp://127.0.0.1:{listening.getsockname()[1]}"


def closed_address() -> str:
    return f"tcp://127.0.0.1:{reserve_for_process()}"


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("tcp://host-a:7070", ("host-a", "7070")),
        ("host-a:7070", ("host-a", "7070")),
        ("host-a", ("host-a", "")),
        ("tcp://[::1]:7070", ("::1", "7070")),
        ("[fd00::1]", ("fd00::1", "")),
    ],
)
def test_address_is_split(address: str, parts: tuple[str, str]) -> None:
    assert split_address(address) == parts


@pytest.mark.parametrize("bound", ["tcp://127.0.0.1:7070", "tcp://10.0.0.0:7070", "tcp://[::1]:7070"])
def test_address_of_one_interface_is_advertised_unchanged(bound: str) -> None:
    assert announced_address(bound, "", "broker:9092").address == bound


@pytest.mark.parametrize(
    ("advertised", "told"),
    [
        ("host-a", "tcp://host-a:7070"),
        ("host-a:17070", "tcp://host-a:17070"),
        ("tcp://host-a:17070", "tcp://host-a:17070"),
        ("[fd00::1]", "tcp://[fd00::1]:7070"),
    ],
)
def test_configured_address_overrides_the_detected_one(advertised: str, told: str) -> None:
    settings = resolve({}, None, {}, {"coordinator.advertised.address": advertised})
    found = announced_address("tcp://0.0.0.0:7070", settings.coordinator_advertised_address, "broker:9092")
    assert found.address == told
    assert not found.warning


@pytest.mark.parametrize("wrong", ["two hosts", "host:port", "http://host:80", "host:1:2", "a/b"])
def test_invalid_advertised_address_is_refused_at_start(wrong: str) -> None:
    with pytest.raises(SettingsError, match="host-a:7070"):
        resolve({}, None, {}, {"coordinator.advertised.address": wrong})


def names(monkeypatch: pytest.MonkeyPatch, own: str, **addresses: str) -> None:
    def getaddrinfo(name: str, *_: object) -> list[object]:
        if name not in addresses:
            raise socket.gaierror(socket.EAI_NONAME, "not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (addresses[name], 0))]

    monkeypatch.setattr(reach.socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(reach.socket, "gethostname", lambda: own)


def test_name_that_resolves_beyond_loopback_is_advertised(monkeypatch: pytest.MonkeyPatch) -> None:
    names(monkeypatch, "host-a", **{"host-a": "192.0.2.7"})
    assert announced_address("tcp://0.0.0.0:7070", "", "").address == "tcp://host-a:7070"


@pytest.mark.parametrize("addresses", [{}, {"host-a": "127.0.1.1"}])
def test_address_towards_the_brokers_is_used_if_the_name_means_nothing_to_others(
    monkeypatch: pytest.MonkeyPatch, addresses: dict[str, str]
) -> None:
    names(monkeypatch, "host-a", **addresses)
    monkeypatch.setattr(reach, "_own_address_towards", lambda _brokers: "192.0.2.7")
    found = announced_address("tcp://0.0.0.0:7070", "", "192.0.2.1:9092")
    assert found.address == "tcp://192.0.2.7:7070"
    assert not found.warning


def test_missing_usable_address_is_logged_as_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    names(monkeypatch, "host-a")
    found = announced_address("tcp://0.0.0.0:7070", "", "127.0.0.1:9092,[broken,:x")
    assert found.address == "tcp://host-a:7070"
    assert "coordinator.advertised.address" in found.warning


def test_connection_trouble_is_described(listener: str) -> None:
    assert trouble_reaching(listener) == ""
    assert "nothing listens" in trouble_reaching(closed_address())
    assert "can't resolve" in trouble_reaching("tcp://no-such-host.invalid:7070")
    assert trouble_reaching("tcp://host:99999999")
    assert trouble_reaching("nonsense")


def test_watch_says_why_an_address_is_not_reached_and_nothing_about_others(listener: str) -> None:
    said: list[str] = []
    watch = ReachWatch(said.append, patience_s=0.02)
    watch.expect("tcp://no-such-host.invalid:7070")
    wait_until(lambda: said, "the reason")
    assert "can't resolve" in said[0]
    assert "coordinator.advertised.address" in said[0]
    said.clear()
    patient = ReachWatch(said.append, patience_s=30)
    patient.expect(closed_address())
    patient.met()
    watch.expect(listener)
    timer = watch._timer
    assert timer is not None
    timer.join(10)
    assert not said


def test_command_says_why_the_coordinator_is_not_reached() -> None:
    with AdminClient(closed_address()) as client, pytest.raises(CoordinatorSilent) as raised:
        client.status(timeout_ms=100)
    assert "nothing listens" in raised.value.message
    assert "coordinator.advertised.address" in raised.value.remedy
