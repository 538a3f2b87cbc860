"""Which connections need keys, and the socket options that enforce them.

Responsible for: the decision whether a connection needs keys (`check_reach`), and the security options of the
coordinator's socket (`CoordinatorSecurity`) and of sockets that connect to it (`ClientSecurity`). Rules:
nothing binds or connects beyond loopback without keys unless the settings say `insecure`; a process that has
keys never falls back to a connection without; a pinned public key takes precedence over one that was merely
announced. Must not decide what a role may send; the coordinator's gate does.
"""

from __future__ import annotations

import ipaddress
import logging
import time
from pathlib import Path

import zmq

from fcluster.common.errors import SettingsError
from fcluster.common.settings import Settings
from fcluster.wire.keys import Keyring, KeysUnusable, Role, public_key_from

_log = logging.getLogger("fcluster.security")

ZAP_DOMAIN = b"fcluster"
ALLOWED_KEPT_S = 1.0
"""A key that was added or removed takes effect within this time, for new connections."""


class CoordinatorSecurity:
    """Options of the coordinator's socket, and the keys that it accepts.

    Args:
        keyring: contains the coordinator's own pair, and the public keys of processes that may connect.

    Raises:
        KeysUnusable: something in it is missing or wrong.
    """

    def __init__(self, keyring: Keyring) -> None:
        self._keyring = keyring
        self.public_key, self._secret_key = keyring.pair(Role.COORDINATOR)
        self._allowed = self._with_own(keyring.allowed())
        self._read_s = time.monotonic()
        self._noted = ""

    def apply(self, socket: zmq.Socket[bytes]) -> None:
        """Make the socket a CURVE server that requires authentication."""
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self._secret_key)
        socket.setsockopt(zmq.ZAP_DOMAIN, ZAP_DOMAIN)

    def authenticate(self, public_key: bytes) -> str | None:
        """The role of the key's holder (Z85 text). None if the key is unknown."""
        if time.monotonic() - self._read_s >= ALLOWED_KEPT_S:
            self._read_again()
        return self._allowed.get(public_key)

    def _with_own(self, allowed: dict[bytes, Role]) -> dict[bytes, Role]:
        # A second coordinator asks the first one whether it is alive.
        return allowed | {self.public_key: Role.COORDINATOR}

    def _read_again(self) -> None:
        self._read_s = time.monotonic()
        try:
            self._allowed = self._with_own(self._keyring.allowed(self._note))
            self._noted = ""
        except KeysUnusable as error:
            self._note(error)  # a directory that is missing for a moment must lock nobody out

    def _note(self, error: KeysUnusable) -> None:
        if error.message != self._noted:
            _log.warning("allowed keys: %s", error.message)
        self._noted = error.message


class ClientSecurity:
    """Options of a socket that connects to the coordinator.

    Args:
        pair: the process's own public and secret key.
        coordinator_key: the public key that the other side has to prove.
    """

    def __init__(self, pair: tuple[bytes, bytes], coordinator_key: bytes) -> None:
        self._public_key, self._secret_key = pair
        self._coordinator_key = coordinator_key

    def apply(self, socket: zmq.Socket[bytes]) -> None:
        """Make the socket a CURVE client."""
        socket.setsockopt(zmq.CURVE_PUBLICKEY, self._public_key)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self._secret_key)
        socket.setsockopt(zmq.CURVE_SERVERKEY, self._coordinator_key)


def coordinator_security(settings: Settings) -> CoordinatorSecurity | None:
    """Security of a coordinator that binds to `settings.coordinator_bind`. None: no keys.

    Raises:
        SettingsError: it would be reachable from other hosts without keys.
        KeysUnusable: the keys directory can't be used.
    """
    keyring = keyring_of(settings)
    if keyring is not None:
        return CoordinatorSecurity(keyring)
    check_reach(settings, settings.coordinator_bind, "The coordinator would listen on")
    return None


def client_security(
    settings: Settings, role: Role, address: str, announced_key: str = ""
) -> ClientSecurity | None:
    """Security of a connection to the coordinator at `address`. None: no keys.

    Args:
        settings: the settings of this process.
        role: whose key to use.
        address: ``tcp://host:port``.
        announced_key: the coordinator's public key in the journal, empty if it has none. It is trusted only
            if the keys directory has no `coordinator.pub`.

    Raises:
        SettingsError: keys are needed, here or by the coordinator, and there are none.
        KeysUnusable: the keys directory can't be used.
    """
    keyring = keyring_of(settings)
    if keyring is None:
        if announced_key:
            raise SettingsError(
                f"The coordinator at {address} requires a key, and no keys are given here.",
                remedy=f"Set security.keys.dir to a directory with {role}.key (and coordinator.pub).",
            )
        check_reach(settings, address, "The coordinator's address is")
        return None
    pair = keyring.pair(role)
    pinned = keyring.coordinator()
    if pinned is None and not announced_key:
        raise SettingsError(
            f"The public key of the coordinator at {address} isn't known.",
            remedy=f"Copy coordinator.pub into {keyring.directory}. (Without that file the key in the "
            "journal is used, but the journal has none: does the coordinator run with security.keys.dir?)",
        )
    if pinned is not None and announced_key and pinned != announced_key.encode():
        _log.warning(
            "the journal names another public key for the coordinator at %s than %s; using the file",
            address,
            keyring.directory / "coordinator.pub",
        )
    return ClientSecurity(pair, pinned or _heard_of(announced_key))


def keyring_of(settings: Settings) -> Keyring | None:
    """The keys that the settings name. None if they name none."""
    return Keyring(Path(settings.security_keys_dir)) if settings.security_keys_dir else None


def check_reach(settings: Settings, address: str, what: str) -> None:
    """Refuse an address beyond loopback for connections without keys.

    Raises:
        SettingsError: the address is beyond loopback, and the settings don't say `insecure`.
    """
    if not settings.insecure and not is_loopback(address):
        raise SettingsError(
            f"{what} {address}, beyond this host, but no keys are given: anyone who can reach it could "
            "take part, and anyone in between could listen.",
            remedy="Create keys with `fcluster keys new DIR` and set security.keys.dir = DIR, or use "
            "--insecure if the network is trusted.",
        )


def _heard_of(announced_key: str) -> bytes:
    key = public_key_from(announced_key)
    if key is None:
        raise SettingsError(
            "The coordinator's public key in the job's journal is not a valid key.",
            remedy="Find out which other program writes to the journal topic, or pin the key with "
            "coordinator.pub in security.keys.dir.",
        )
    return key


def is_loopback(address: str) -> bool:
    """Whether `address` can be used only by processes of this host."""
    scheme, _, rest = address.partition("://")
    if scheme in ("ipc", "inproc"):
        return True
    host = rest.rpartition(":")[0].removeprefix("[").removesuffix("]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name, an interface or a wildcard: unknown
