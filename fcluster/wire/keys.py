"""The keys of control connections: a directory of key files, each bound to a role.

Responsible for: creating key pairs, reading them, and who is allowed. Rules: a secret key is readable only by
its owner (and at most the owner's group); nothing is ever overwritten; the file itself says which role its
key is for, so renaming a worker's key doesn't make it an admin's. Secret keys appear in no message and no
`repr`. Must not know sockets or settings.

Files: `<role>.key` is secret, `<role>.pub` is public. Additional keys of a role are `<role>-<name>.key` and
`.pub`. A process uses `<role>.key`. A coordinator accepts the holder of the secret key for any `.pub` file
that it has.
"""

from __future__ import annotations

import os
import re
import stat
import struct
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Literal

import zmq
from zmq.utils import z85

from fcluster.common.errors import FclusterError

DIRECTORY_MODE = 0o700
SECRET_MODE = 0o600
PUBLIC_MODE = 0o644
_FILE_BYTES_MAX = 4096
_KEY = re.compile(r"[0-9A-Za-z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
_LINE = re.compile(rf"fcluster (coordinator|worker|admin) (public|secret) ({_KEY.pattern})")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

Half = Literal["public", "secret"]


class KeysUnusable(FclusterError):  # noqa: N818  named after what is wrong
    """A keys directory lacks something, or can't be trusted."""


class Role(StrEnum):
    """The role of a key's holder."""

    COORDINATOR = "coordinator"
    WORKER = "worker"
    ADMIN = "admin"


def public_key_from(text: str) -> bytes | None:
    """`text` as a public key (Z85). None if it can't be one."""
    if not _KEY.fullmatch(text):
        return None
    try:
        z85.decode(text.encode())
    except (ValueError, struct.error):
        return None  # five characters can say more than four bytes hold
    return text.encode()


class Keyring:
    """The keys in `directory`. Each method reads the files again."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __repr__(self) -> str:
        return f"Keyring({str(self.directory)!r})"

    def pair(self, role: Role) -> tuple[bytes, bytes]:
        """Public and secret key of this process, as Z85 text.

        Raises:
            KeysUnusable: there is none, or other users can read it.
        """
        self._check_directory()
        path = self.directory / f"{role}.key"
        secret = _read(path, "secret", role)
        return zmq.curve_public(secret), secret

    def coordinator(self) -> bytes | None:
        """The coordinator's public key, the only one that its clients then trust. None if it isn't here.

        Raises:
            KeysUnusable: the file isn't a coordinator's public key.
        """
        path = self.directory / "coordinator.pub"
        return _read(path, "public", Role.COORDINATOR) if path.exists() else None

    def allowed(self, on_bad_file: Callable[[KeysUnusable], None] | None = None) -> dict[bytes, Role]:
        """The public keys that a coordinator accepts, and the roles of their holders.

        Args:
            on_bad_file: called with the error for a file that isn't what its name says. The file is then
                ignored.

        Raises:
            KeysUnusable: the directory can't be used; without `on_bad_file` also for a file in it.
        """
        self._check_directory()
        found: dict[bytes, Role] = {}
        for path, role in self.public_files():
            try:
                found[_read(path, "public", role)] = role
            except KeysUnusable as error:
                if on_bad_file is None:
                    raise
                on_bad_file(error)
        return found

    def public_files(self) -> list[tuple[Path, Role]]:
        """The files of public keys, and the role that each file name promises."""
        try:
            paths = sorted(self.directory.glob("*.pub"))
        except OSError as error:
            raise _unreadable(self.directory, error) from error
        return [(path, role) for path in paths if (role := _role_of(path.stem)) is not None]

    def _check_directory(self) -> None:
        try:
            mode = self.directory.stat().st_mode
        except OSError as error:
            raise _unreadable(self.directory, error) from error
        if not stat.S_ISDIR(mode):
            raise KeysUnusable(
                f"{self.directory} is no directory.", remedy="security.keys.dir names a directory of keys."
            )
        # Volumes of secrets are mounted like this, but read-only.
        if mode & 0o002 and not _is_read_only(self.directory):
            raise KeysUnusable(
                f"The keys directory {self.directory} is writable by everyone.",
                remedy=f"chmod 700 {self.directory}, and check that the keys in it are yours.",
            )


def create_keys(directory: Path) -> dict[Role, bytes]:
    """Create a key pair for each role. Returns the public keys.

    Raises:
        KeysUnusable: one of the files already exists, or can't be written.
    """
    made: dict[Role, bytes] = {}
    _create(directory, [(role, role.value) for role in Role], made)
    return made


def add_key(directory: Path, role: Role, name: str) -> bytes:
    """Create an additional key pair of `role`, `<role>-<name>`. Returns its public key.

    Raises:
        KeysUnusable: it already exists, can't be written, or the name isn't valid.
    """
    if not _NAME.fullmatch(name):
        raise KeysUnusable(
            f"{name!r} isn't a valid name for a key.", remedy="Use up to 64 letters, digits, dots, dashes."
        )
    if role is Role.COORDINATOR:
        raise KeysUnusable(
            "A cluster has one coordinator key, the only one that clients trust.",
            remedy="Standby coordinators share coordinator.key. For a new key, create a new directory.",
        )
    made: dict[Role, bytes] = {}
    _create(directory, [(role, f"{role}-{name}")], made)
    return made[role]


def _create(directory: Path, wanted: list[tuple[Role, str]], made: dict[Role, bytes]) -> None:
    existing = [
        path
        for _, stem in wanted
        for half in (".key", ".pub")
        if (path := directory / f"{stem}{half}").exists()
    ]
    if existing:
        raise KeysUnusable(
            f"{existing[0]} already exists, and keys are never overwritten.",
            remedy="Choose another directory, or remove the old keys if they are no longer used.",
        )
    written: list[Path] = []
    try:
        directory.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
        for role, stem in wanted:
            public, secret = zmq.curve_keypair()
            made[role] = public
            written.append(_write(directory / f"{stem}.key", role, "secret", secret))
            written.append(_write(directory / f"{stem}.pub", role, "public", public))
    except OSError as error:
        for path in written:
            path.unlink(missing_ok=True)
        raise KeysUnusable(
            f"Can't write keys to {directory}: {error.strerror or error}.",
            remedy="Choose another directory, or correct its permissions.",
        ) from error


def _write(path: Path, role: Role, half: Half, key: bytes) -> Path:
    mode = SECRET_MODE if half == "secret" else PUBLIC_MODE
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, mode)  # independent of the umask
        file.write(f"fcluster {role} {half} {key.decode()}\n".encode())
        file.flush()
        os.fsync(descriptor)
    return path


def _read(path: Path, half: Half, role: Role) -> bytes:
    # Links are followed, because orchestrators mount secrets through links.
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read(_FILE_BYTES_MAX)
    except OSError as error:
        raise _unreadable(path, error) from error
    if half == "secret" and mode & 0o027:
        raise KeysUnusable(
            f"The secret key {path} is accessible to other users (mode {stat.S_IMODE(mode):03o}).",
            remedy=f"chmod 600 {path}",
        )
    if mode & 0o002:
        raise KeysUnusable(
            f"The key {path} is writable by everyone.",
            remedy=f"chmod 644 {path}, and copy it again from where it was created, because it may have been "
            "replaced.",
        )
    match = _LINE.fullmatch(text.decode("ascii", "replace").strip())
    if match is None or match[2] != half:
        raise KeysUnusable(
            f"{path} contains no {half} key.", remedy="Copy it again; `fcluster keys new DIR` creates keys."
        )
    if public_key_from(match[3]) is None:
        raise KeysUnusable(f"{path} is damaged.", remedy="Copy it again from where it was created.")
    if match[1] != role:
        raise KeysUnusable(
            f"{path} is a key of the role {match[1]!r}, not {str(role)!r}.",
            remedy="A key is bound to its role. Use the key file of the right role, under its own name.",
        )
    return match[3].encode()


def _is_read_only(directory: Path) -> bool:
    return bool(os.statvfs(directory).f_flag & os.ST_RDONLY)


def _role_of(stem: str) -> Role | None:
    prefix = stem.partition("-")[0]
    try:
        return Role(prefix)
    except ValueError:
        return None  # not one of our files


def _unreadable(path: Path, error: OSError) -> KeysUnusable:
    return KeysUnusable(
        f"Can't read the keys at {path}: {error.strerror or error}.",
        remedy="Check the setting security.keys.dir; `fcluster keys new DIR` creates keys.",
    )


def describe_keys(directory: Path) -> list[Mapping[str, str]]:
    """The contents of a keys directory, without secrets: role, name, public key, and which halves are here.

    Raises:
        KeysUnusable: it can't be read, or something in it is wrong.
    """
    ring = Keyring(directory)
    ring._check_directory()  # pyright: ignore[reportPrivateUsage]
    rows: list[Mapping[str, str]] = []
    stems = {path.stem for path in directory.iterdir() if path.suffix in (".key", ".pub")}
    for stem in sorted(stems):
        role = _role_of(stem)
        if role is None:
            continue
        secret, public = directory / f"{stem}.key", directory / f"{stem}.pub"
        halves = [half for half, path in (("secret", secret), ("public", public)) if path.exists()]
        key = (
            _read(public, "public", role)
            if public.exists()
            else zmq.curve_public(_read(secret, "secret", role))
        )
        if len(halves) == 2 and zmq.curve_public(_read(secret, "secret", role)) != key:
            raise KeysUnusable(
                f"{secret} and {public} don't belong together.",
                remedy="Copy both again from the same directory.",
            )
        rows.append({"role": str(role), "name": stem, "public": key.decode(), "here": " and ".join(halves)})
    return rows
