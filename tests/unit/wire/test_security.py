"""Which processes can connect to each other, with real sockets: with keys, without, and with wrong ones."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from fcluster.common.errors import FclusterError, SettingsError
from fcluster.common.settings import Settings, with_settings
from fcluster.wire import security
from fcluster.wire.admin_client import AdminClient, KeyRefused
from fcluster.wire.keys import Keyring, KeysUnusable, Role, add_key, create_keys
from fcluster.wire.security import (
    ClientSecurity,
    CoordinatorSecurity,
    client_security,
    coordinator_security,
    is_loopback,
)
from fcluster.wire.transport import (
    DealerTransport,
    FrameReceived,
    HandshakeFailed,
    RouterTransport,
    TransportEvent,
)

DEADLINE_S = 10.0
BEYOND = "tcp://192.0.2.1:7070"
NEAR = "tcp://127.0.0.1:7070"


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    create_keys(tmp_path / "keys")
    return tmp_path / "keys"


@pytest.fixture
def keyed(keys: Path) -> Settings:
    return with_settings(Settings(), security_keys_dir=str(keys))


# --- the decision --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    [
        "tcp://127.0.0.1:0",
        "tcp://127.8.9.1:70",
        "tcp://localhost:*",
        "tcp://[::1]:70",
        "ipc:///x",
        "inproc://x",
    ],
)
def test_loopback_addresses_are_recognised(address: str) -> None:
    assert is_loopback(address)


@pytest.mark.parametrize(
    "address",
    [
        "tcp://0.0.0.0:1",
        "tcp://*:1",
        "tcp://127.0.0.1.example.com:1",
        "tcp://host:1",
        "tcp://[::]:1",
        "tcp://eth0:1",
        "tcp://127.0.0.1;192.0.2.1:1",
        "tcp://127.1:1",
        "tcp://:1",
        "tcp://",
        "",
    ],
)
def test_other_addresses_are_not_loopback(address: str) -> None:
    assert not is_loopback(address)


def test_loopback_needs_no_keys() -> None:
    assert coordinator_security(Settings()) is None
    assert client_security(Settings(), Role.WORKER, NEAR) is None


def test_beyond_loopback_both_sides_require_keys() -> None:
    with pytest.raises(SettingsError, match=r"listen on tcp://0\.0\.0\.0:70") as raised:
        coordinator_security(with_settings(Settings(), coordinator_bind="tcp://0.0.0.0:70"))
    assert "fcluster keys new" in raised.value.remedy
    assert "--insecure" in raised.value.remedy
    for role in (Role.WORKER, Role.ADMIN):
        with pytest.raises(SettingsError, match="beyond this host"):
            client_security(Settings(), role, BEYOND)


def test_insecure_allows_connections_without_keys() -> None:
    settings = with_settings(Settings(), insecure=True, coordinator_bind="tcp://0.0.0.0:70")
    assert coordinator_security(settings) is None
    assert client_security(settings, Role.WORKER, BEYOND) is None


def test_keys_are_used_even_if_insecure_is_set(keyed: Settings) -> None:
    settings = with_settings(keyed, insecure=True)
    assert coordinator_security(settings) is not None
    assert client_security(settings, Role.WORKER, BEYOND) is not None


def test_client_without_keys_is_told_that_the_coordinator_requires_them(keys: Path) -> None:
    announced = Keyring(keys).pair(Role.COORDINATOR)[0].decode()
    for settings in (Settings(), with_settings(Settings(), insecure=True)):
        with pytest.raises(SettingsError, match="requires a key") as raised:
            client_security(settings, Role.WORKER, NEAR, announced)
        assert "worker.key" in raised.value.remedy


def test_client_with_keys_never_connects_without(keyed: Settings, keys: Path) -> None:
    (keys / "coordinator.pub").unlink()
    with pytest.raises(SettingsError, match="public key of the coordinator"):
        client_security(with_settings(keyed, insecure=True), Role.WORKER, NEAR, "")


@pytest.mark.parametrize("announced", ["nonsense", "#" * 40])
def test_invalid_public_key_in_the_journal_is_refused(keyed: Settings, keys: Path, announced: str) -> None:
    (keys / "coordinator.pub").unlink()
    with pytest.raises(SettingsError, match="is not a valid key"):
        client_security(keyed, Role.WORKER, NEAR, announced)


def test_each_role_needs_its_own_secret_key(keyed: Settings, keys: Path) -> None:
    (keys / "admin.key").unlink()
    assert client_security(keyed, Role.WORKER, NEAR) is not None
    with pytest.raises(KeysUnusable, match=r"admin\.key"):
        client_security(keyed, Role.ADMIN, NEAR)


# --- over sockets --------------------------------------------------------------------------------------


class Client:
    """A DealerTransport, and what it reported."""

    def __init__(self, name: bytes = b"w1") -> None:
        self.connected: queue.Queue[bool] = queue.Queue()
        self.refused: queue.Queue[str] = queue.Queue()
        self.frames: queue.Queue[bytes] = queue.Queue()
        self.transport = DealerTransport(
            name, self.frames.put, lambda: self.connected.put(True), lambda: None, self.refused.put
        )


@pytest.fixture
def router(keys: Path) -> Iterator[RouterTransport]:
    transport = RouterTransport(CoordinatorSecurity(Keyring(keys)))
    yield transport
    transport.close()


@pytest.fixture
def client() -> Iterator[Client]:
    made = Client()
    yield made
    made.transport.close()


def poll_until(
    router: RouterTransport, wanted: Callable[[list[TransportEvent]], object]
) -> list[TransportEvent]:
    events: list[TransportEvent] = []
    deadline_s = time.monotonic() + DEADLINE_S
    while not wanted(events):
        assert time.monotonic() < deadline_s, events
        events += router.poll(50)
    return events


def frames(events: list[TransportEvent]) -> list[FrameReceived]:
    return [event for event in events if isinstance(event, FrameReceived)]


def failures(events: list[TransportEvent]) -> list[str]:
    return [event.reason for event in events if isinstance(event, HandshakeFailed)]


@pytest.mark.parametrize("role", list(Role))
def test_frames_have_the_role_of_their_senders_key(
    router: RouterTransport, client: Client, keyed: Settings, role: Role
) -> None:
    address = router.bind("tcp://127.0.0.1:*")
    client.transport.connect(address, client_security(keyed, role, address))
    client.transport.send(b"hello")
    assert frames(poll_until(router, frames)) == [FrameReceived(b"w1", b"hello", role.value)]
    assert router.send(b"w1", b"welcome")
    assert client.frames.get(timeout=DEADLINE_S) == b"welcome"
    assert router.failed_handshakes == 0


def test_unknown_key_is_refused_and_the_client_is_told(
    router: RouterTransport, client: Client, keys: Path
) -> None:
    address = router.bind("tcp://127.0.0.1:*")
    strangers = zmq.curve_keypair()
    client.transport.connect(address, ClientSecurity(strangers, Keyring(keys).pair(Role.COORDINATOR)[0]))
    client.transport.send(b"hello")
    events = poll_until(router, failures)
    assert strangers[0].decode() in failures(events)[0]
    assert "127.0.0.1" in failures(events)[0]
    assert "doesn't know this key" in client.refused.get(timeout=DEADLINE_S)
    assert frames(events) == []
    assert router.failed_handshakes == 1


def test_key_that_is_added_later_is_accepted_without_a_restart(
    router: RouterTransport, client: Client, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(security, "ALLOWED_KEPT_S", 0.0)
    monkeypatch.setattr("fcluster.wire.transport.GIVEN_UP_RETRY_S", 0.05)
    address = router.bind("tcp://127.0.0.1:*")
    add_key(keys, Role.WORKER, "late")
    hidden = (keys / "worker-late.pub").rename(keys / "aside")
    (keys / "worker-late.key").replace(keys / "worker.key")
    pair = Keyring(keys).pair(Role.WORKER)
    client.transport.connect(address, ClientSecurity(pair, Keyring(keys).pair(Role.COORDINATOR)[0]))
    assert failures(poll_until(router, failures))
    hidden.rename(keys / "worker-late.pub")
    poll_until(router, lambda _events: not client.connected.empty())
    client.transport.send(b"here")
    assert frames(poll_until(router, frames)) == [FrameReceived(b"w1", b"here", "worker")]


def test_client_without_keys_is_refused(router: RouterTransport, client: Client) -> None:
    client.transport.connect(router.bind("tcp://127.0.0.1:*"))
    client.transport.send(b"hello")
    # Each side notices it by itself, in either order.
    events = poll_until(router, lambda _events: not client.refused.empty() and router.failed_handshakes > 0)
    assert "keys" in client.refused.get()
    assert frames(events) == []


def test_client_with_keys_refuses_a_coordinator_without(client: Client, keyed: Settings) -> None:
    router = RouterTransport()
    try:
        address = router.bind("tcp://127.0.0.1:*")
        client.transport.connect(address, client_security(keyed, Role.WORKER, address))
        client.transport.send(b"hello")
        events = poll_until(router, lambda _events: not client.refused.empty())
        assert "keys" in client.refused.get()
        assert frames(events) == []
    finally:
        router.close()


def test_pinned_key_overrides_the_journals_and_an_impostor_gets_nothing(
    client: Client, keyed: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    create_keys(tmp_path / "impostor")
    impostor = RouterTransport(CoordinatorSecurity(Keyring(tmp_path / "impostor")))
    try:
        address = impostor.bind("tcp://127.0.0.1:*")
        announced = Keyring(tmp_path / "impostor").pair(Role.COORDINATOR)[0].decode()
        with caplog.at_level(logging.WARNING):
            options = client_security(keyed, Role.WORKER, address, announced)
        assert "another public key" in caplog.text
        client.transport.connect(address, options)
        client.transport.send(b"hello")
        events = poll_until(impostor, lambda _events: not client.refused.empty())
        assert frames(events) == []
    finally:
        impostor.close()


def test_without_a_pinned_key_the_journals_key_is_trusted(
    router: RouterTransport, client: Client, keyed: Settings, keys: Path
) -> None:
    announced = Keyring(keys).pair(Role.COORDINATOR)[0].decode()
    (keys / "coordinator.pub").unlink()
    address = router.bind("tcp://127.0.0.1:*")
    client.transport.connect(address, client_security(keyed, Role.WORKER, address, announced))
    client.transport.send(b"hello")
    assert frames(poll_until(router, frames))


def test_admin_command_with_a_wrong_key_fails_with_the_reason_before_its_timeout(
    router: RouterTransport, keys: Path
) -> None:
    address = router.bind("tcp://127.0.0.1:*")
    wrong = ClientSecurity(zmq.curve_keypair(), Keyring(keys).pair(Role.COORDINATOR)[0])
    outcome: queue.Queue[FclusterError] = queue.Queue()

    def ask() -> None:
        with AdminClient(address, wrong) as client:
            try:
                client.status(timeout_ms=60_000)
            except FclusterError as error:
                outcome.put(error)

    thread = threading.Thread(target=ask)
    thread.start()
    poll_until(router, lambda _events: not outcome.empty())
    thread.join()
    error = outcome.get()
    assert isinstance(error, KeyRefused)
    assert "doesn't know this key" in error.message
    assert "admin.key" in error.remedy


def test_removed_key_directory_changes_nothing_until_it_is_back(
    keys: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(security, "ALLOWED_KEPT_S", 0.0)
    worker = Keyring(keys).pair(Role.WORKER)[0]
    server = CoordinatorSecurity(Keyring(keys))
    aside = keys.rename(keys.with_name("aside"))
    assert server.authenticate(worker) == "worker"
    assert server.authenticate(worker) == "worker"
    assert len(caplog.records) == 1
    (aside / "worker.pub").unlink()
    aside.rename(keys)
    assert server.authenticate(worker) is None
    assert server.authenticate(Keyring(keys).pair(Role.ADMIN)[0]) == "admin"


def test_incomplete_key_file_does_not_lock_others_out(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(security, "ALLOWED_KEPT_S", 0.0)
    server = CoordinatorSecurity(Keyring(keys))
    (keys / "admin-new.pub").write_text("fcluster adm")
    assert server.authenticate(Keyring(keys).pair(Role.WORKER)[0]) == "worker"


def test_secret_keys_are_never_shown(keys: Path, keyed: Settings) -> None:
    secrets = [Keyring(keys).pair(role)[1].decode() for role in Role]
    shown: list[Any] = [keyed, keyed.redacted(), Keyring(keys), coordinator_security(keyed)]
    shown += [client_security(keyed, Role.WORKER, NEAR)]
    assert not any(secret in repr(item) for item in shown for secret in secrets)
    assert keyed.redacted()["security.keys.dir"] == str(keys)
