"""Settings for security: where keys are, and how secrets reach clients and child processes."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from fcluster.cli import preflight
from fcluster.cli.ending import Session
from fcluster.cli.main import commands
from fcluster.common.errors import FclusterError
from fcluster.common.settings import (
    HANDED_FLAGS,
    REDACTED,
    Settings,
    hand_over,
    handed_flags,
    is_secret,
    resolve,
)
from fcluster.kafka.clients import consumer_config, make_admin, producer_config
from fcluster.wire.keys import Keyring, Role

LOGIN = {
    "security.protocol": "SASL_SSL",
    "sasl.mechanism": "SCRAM-SHA-512",
    "sasl.username": "me",
    "sasl.password": "S3cret",
    "ssl.ca.location": "/etc/ca.pem",
}


def toml_of(login: dict[str, str]) -> str:
    return "[kafka]\n" + "".join(f'{name} = "{value}"\n' for name, value in login.items())


@pytest.mark.parametrize("origin", ["file", "environment", "handed over"])
def test_login_reaches_every_kind_of_client(tmp_path: Path, origin: str) -> None:
    toml, env, flags = None, {}, {}
    if origin == "file":
        toml = tmp_path / "fcluster.toml"
        toml.write_text(toml_of(LOGIN))
    elif origin == "environment":
        env = {"FCLUSTER_KAFKA_" + name.replace(".", "_").upper(): value for name, value in LOGIN.items()}
    else:
        seen, hidden = hand_over({f"kafka.{name}": value for name, value in LOGIN.items()})
        assert "S3cret" not in str(seen)
        flags = seen | handed_flags(hidden)
    settings = resolve({"bootstrap.servers": "a:1"}, toml, env, flags)
    for config in (consumer_config(settings, "read-committed"), producer_config(settings, "id")):
        assert LOGIN.items() <= config.items()
    assert settings.redacted()["kafka.sasl.password"] == REDACTED
    assert settings.redacted()["kafka.sasl.mechanism"] == "SCRAM-SHA-512"
    assert "S3cret" not in repr(settings)


@pytest.mark.parametrize(
    "login",
    [
        {"ssl.key.pem": "S3cret"},
        {"security.protocol": "ssl", "ssl.key.pem": "S3cret", "ssl.certificate.pem": "S3cret"},
        {"security.protocol": "sasl_ssl", "sasl.mechanism": "S", "sasl.password": "S3cret"},
        {
            "security.protocol": "sasl_ssl",
            "sasl.mechanism": "OAUTHBEARER",
            "sasl.oauthbearer.config": "S3cret",
        },
        {"security.protocol": "nonsense", "sasl.password": "S3cret"},
        {"ssl.keystore.location": "/nowhere", "security.protocol": "ssl", "ssl.keystore.password": "S3cret"},
    ],
)
def test_login_that_librdkafka_refuses_is_not_shown(
    login: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    settings = resolve(
        {"bootstrap.servers": "127.0.0.1:1"}, None, {}, {f"kafka.{k}": v for k, v in login.items()}
    )
    said = ""
    try:
        make_admin(settings)
    except FclusterError as error:
        said = str(error)
    assert "S3cret" not in said + caplog.text


def test_keys_directory_is_an_ordinary_setting_and_not_secret() -> None:
    settings = resolve({}, None, {"FCLUSTER_SECURITY_KEYS_DIR": "/etc/keys"}, {})
    assert settings.security_keys_dir == "/etc/keys"
    assert settings.redacted()["security.keys.dir"] == "/etc/keys"
    assert not is_secret("security.keys.dir", "/etc/keys")
    assert resolve({}, None, {}, settings.as_mapping()) == settings


def test_flags_without_secrets_remain_arguments() -> None:
    assert hand_over({"workers": "4"}) == ({"workers": "4"}, {})
    seen, hidden = hand_over({"workers": "4", "snapshots": "s3://me:pass@host/x"})
    assert seen == {"workers": "4"}
    assert list(hidden) == [HANDED_FLAGS]
    assert handed_flags(hidden) == {"snapshots": "s3://me:pass@host/x"}
    assert handed_flags({}) == {}
    resolve({}, None, hidden, {})  # the variable isn't a setting itself


def test_coordinator_listens_at_the_configured_address_and_is_found_locally(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(preflight, "reserve_for_process", lambda: 1234)
    listening = preflight.listening_addresses
    assert listening("tcp://127.0.0.1:0") == ("tcp://127.0.0.1:1234",) * 2
    assert listening("tcp://0.0.0.0:7070") == ("tcp://0.0.0.0:7070", "tcp://127.0.0.1:7070")
    assert listening("tcp://*:0") == ("tcp://*:1234", "tcp://127.0.0.1:1234")
    assert listening("tcp://10.0.0.5:7070") == ("tcp://10.0.0.5:7070",) * 2
    assert listening("ipc:///tmp/x") == ("ipc:///tmp/x",) * 2


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"coordinator.bind": "tcp://0.0.0.0:1", "insecure": "true"},
        {"coordinator.bind": "tcp://0.0.0.0:1", "security.keys.dir": "mine"},
    ],
)
def test_up_creates_no_keys_if_none_are_needed_or_others_are_given(
    tmp_path: Path, settings: dict[str, str]
) -> None:
    resolved = resolve({}, None, {}, settings)
    assert preflight.with_own_keys(resolved, tmp_path) == resolved
    assert list(tmp_path.iterdir()) == []


def test_up_creates_keys_once_if_others_can_connect(tmp_path: Path) -> None:
    resolved = resolve({}, None, {}, {"coordinator.bind": "tcp://0.0.0.0:1"})
    first = preflight.with_own_keys(resolved, tmp_path)
    assert first.security_keys_dir == str(tmp_path / "keys")
    pair = Keyring(tmp_path / "keys").pair(Role.WORKER)
    assert preflight.with_own_keys(resolved, tmp_path) == first
    assert Keyring(tmp_path / "keys").pair(Role.WORKER) == pair


# --- commands ------------------------------------------------------------------------------------------


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(commands, arguments, obj=Session(), prog_name="fcluster")
    assert result.exit_code == code, result.output
    return result.output


def test_keys_are_created_added_and_shown(tmp_path: Path) -> None:
    directory = str(tmp_path / "keys")
    made = run("keys", "new", directory)
    public = Keyring(tmp_path / "keys").pair(Role.ADMIN)[0].decode()
    assert public in made
    assert "worker-host2" in run("keys", "add", directory, "worker", "host2")
    shown = run("keys", "show", directory)
    assert public in shown
    assert shown.count("secret and public") == 4
    for path in (tmp_path / "keys").glob("*.key"):
        assert path.read_text().split()[-1] not in made + shown
    assert "never overwritten" in run("keys", "new", directory, code=1)
    assert "coordinator" in run("keys", "add", directory, "coordinator", "x", code=2)


def test_secret_on_the_command_line_causes_a_warning() -> None:
    said = run("status", "--set", "kafka.sasl.password=S3cret", "--data-dir", "/nonexistent", code=1)
    assert "warning: other users of this host can see kafka.sasl.password" in said
    assert "FCLUSTER_KAFKA_SASL_PASSWORD" in said
    assert "S3cret" not in said
    assert Settings().kafka == {}
