"""Key files are created once, accessible to their owner only, and bound to their role."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import zmq

from fcluster.wire import keys as keys_module
from fcluster.wire.keys import (
    Keyring,
    KeysUnusable,
    Role,
    add_key,
    create_keys,
    describe_keys,
    public_key_from,
)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    directory = tmp_path / "keys"
    create_keys(directory)
    return directory


def test_new_keys_are_pairs_that_only_their_owner_can_read(tmp_path: Path) -> None:
    directory = tmp_path / "a" / "keys"
    former = os.umask(0o000)
    try:
        public = create_keys(directory)
    finally:
        os.umask(former)
    assert set(public) == set(Role)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    for role in Role:
        assert stat.S_IMODE((directory / f"{role}.key").stat().st_mode) == 0o600
        assert Keyring(directory).pair(role)[0] == public[role]
        assert zmq.curve_public(Keyring(directory).pair(role)[1]) == public[role]
    assert Keyring(directory).coordinator() == public[Role.COORDINATOR]
    assert Keyring(directory).allowed() == {key: role for role, key in public.items()}


@pytest.mark.parametrize("file", ["coordinator.key", "admin.pub"])
def test_existing_files_are_not_overwritten_and_no_others_are_added(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_text("mine")
    with pytest.raises(KeysUnusable, match="already exists"):
        create_keys(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [file]
    assert (tmp_path / file).read_text() == "mine"


def test_added_key_is_allowed_until_its_public_half_is_removed(directory: Path) -> None:
    public = add_key(directory, Role.WORKER, "host2")
    assert Keyring(directory).allowed()[public] is Role.WORKER
    with pytest.raises(KeysUnusable, match="already exists"):
        add_key(directory, Role.WORKER, "host2")
    (directory / "worker-host2.pub").unlink()
    assert public not in Keyring(directory).allowed()


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "x" * 65])
def test_key_names_stay_within_the_directory(directory: Path, name: str) -> None:
    with pytest.raises(KeysUnusable, match="isn't a valid name"):
        add_key(directory, Role.WORKER, name)


def test_there_is_one_coordinator_key(directory: Path) -> None:
    with pytest.raises(KeysUnusable, match="one coordinator key"):
        add_key(directory, Role.COORDINATOR, "second")


def test_key_under_the_name_of_another_role_is_refused(directory: Path) -> None:
    for half in ("key", "pub"):
        (directory / f"worker.{half}").replace(directory / f"admin.{half}")
    with pytest.raises(KeysUnusable, match="role 'worker', not 'admin'"):
        Keyring(directory).pair(Role.ADMIN)
    with pytest.raises(KeysUnusable, match="role 'worker', not 'admin'"):
        Keyring(directory).allowed()


def test_secret_in_place_of_a_public_key_is_refused_and_not_shown(directory: Path) -> None:
    secret = (directory / "worker.key").read_bytes()
    (directory / "worker.pub").write_bytes(secret)
    with pytest.raises(KeysUnusable, match="no public key") as raised:
        Keyring(directory).allowed()
    assert secret.split()[-1].decode() not in str(raised.value)


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o620, 0o660])
def test_secret_key_that_others_could_read_or_change_is_refused(directory: Path, mode: int) -> None:
    (directory / "worker.key").chmod(mode)
    with pytest.raises(KeysUnusable, match="accessible to other users"):
        Keyring(directory).pair(Role.WORKER)


def test_keys_mounted_by_an_orchestrator_are_accepted(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Kubernetes: links, readable by the group, in a sticky directory that is mounted read-only. Otherwise
    # everybody could write to it.
    monkeypatch.setattr(keys_module, "_is_read_only", lambda _directory: True)
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    mounted.chmod(0o1777)
    for path in directory.iterdir():
        path.chmod(0o440)
        (mounted / path.name).symlink_to(path)
    assert Keyring(mounted).pair(Role.WORKER) == Keyring(directory).pair(Role.WORKER)
    assert Keyring(mounted).allowed() == Keyring(directory).allowed()


@pytest.mark.parametrize("mode", [0o777, 0o1777])
def test_directory_that_everybody_may_write_is_refused(directory: Path, mode: int) -> None:
    directory.chmod(mode)  # sticky or not: whoever adds a .pub file there is let in
    with pytest.raises(KeysUnusable, match="writable by everyone"):
        Keyring(directory).allowed()


def test_public_key_that_everybody_may_change_is_refused(directory: Path) -> None:
    (directory / "admin.pub").chmod(0o666)
    with pytest.raises(KeysUnusable, match="writable by everyone"):
        Keyring(directory).allowed()
    noted: list[KeysUnusable] = []
    assert Role.ADMIN not in Keyring(directory).allowed(noted.append).values()


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"fcluster worker public short", b"x" * 100_000])
def test_damaged_file_is_named(directory: Path, content: bytes) -> None:
    (directory / "worker.pub").write_bytes(content)
    with pytest.raises(KeysUnusable, match=r"worker\.pub contains no public key"):
        Keyring(directory).allowed()
    noted: list[KeysUnusable] = []
    assert Role.WORKER not in Keyring(directory).allowed(noted.append).values()
    assert len(noted) == 1


def test_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeysUnusable, match="nowhere: No such file") as raised:
        Keyring(tmp_path / "nowhere").pair(Role.WORKER)
    assert "security.keys.dir" in raised.value.remedy


def test_other_files_are_ignored(directory: Path) -> None:
    (directory / "notes.pub").write_text("hello")
    assert len(Keyring(directory).allowed()) == 3


def test_description_shows_public_halves_only(directory: Path) -> None:
    (directory / "admin.key").unlink()
    rows = {row["name"]: row for row in describe_keys(directory)}
    assert rows["admin"]["here"] == "public"
    assert rows["worker"]["here"] == "secret and public"
    secret = Keyring(directory).pair(Role.WORKER)[1].decode()
    assert secret not in str(rows)
    assert rows["worker"]["public"] == Keyring(directory).pair(Role.WORKER)[0].decode()


def test_halves_of_different_pairs_are_reported(directory: Path, tmp_path: Path) -> None:
    create_keys(tmp_path / "other")
    (tmp_path / "other" / "worker.pub").replace(directory / "worker.pub")
    with pytest.raises(KeysUnusable, match="don't belong together"):
        describe_keys(directory)


def test_other_text_is_distinguished_from_a_key() -> None:
    public, _ = zmq.curve_keypair()
    assert public_key_from(public.decode()) == public
    for text in ("", "short", "#" * 40, "ä" * 40, public.decode() + "x"):
        assert public_key_from(text) is None
