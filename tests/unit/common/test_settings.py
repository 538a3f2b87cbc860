from __future__ import annotations

import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fcluster.common.errors import SettingsError
from fcluster.common.settings import (
    REDACTED,
    Settings,
    default_toml,
    isolation_from,
    parse_duration_ms,
    redact,
    resolve,
    with_settings,
)

ATTRIBUTES = [
    name
    for name in Settings.__dataclass_fields__
    if name not in ("kafka", "reading_group", "schema_registry")
]


def from_job(settings: Mapping[str, Any]) -> Settings:
    return resolve(settings, None, {}, {})


def refused(
    job: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> SettingsError:
    with pytest.raises(SettingsError) as caught:
        resolve(job or {}, None, env or {}, flags or {})
    assert caught.value.remedy
    return caught.value


# --- names and origins ----------------------------------------------------------------------------------


def test_without_settings_the_defaults_apply() -> None:
    settings = resolve({}, None, {}, {})
    assert settings == Settings()
    assert (settings.commit_interval_min_ms, settings.commit_interval_max_ms) == (10, 1000)
    assert settings.processing_guarantee == "exactly-once"
    assert settings.isolation_level == "read-committed"
    assert settings.snapshots == str(Path(".fcluster/snapshots"))


def test_later_origins_win(tmp_path: Path) -> None:
    toml = tmp_path / "fcluster.toml"
    job = {"workers": 1, "num.standby.replicas": 1, "state.dir": "job", "epoch.records.max": 1}
    toml.write_text('workers = 2\nnum.standby.replicas = 2\n[state]\ndir = "toml"\n')
    env = {
        "FCLUSTER_WORKERS": "3",
        "FCLUSTER_NUM_STANDBY_REPLICAS": "3",
        "PATH": "/bin",
        "FCLUSTER_STATE_DIR": "",
    }
    settings = resolve(job, toml, env, {"workers": 4, "num.standby.replicas": None})
    assert settings.workers == 4
    assert settings.num_standby_replicas == 3
    assert settings.state_dir == "toml"
    assert settings.epoch_records_max == 1


@given(st.sampled_from(ATTRIBUTES), st.lists(st.sampled_from("._-"), min_size=8, max_size=8), st.booleans())
def test_names_are_forgiving_about_separators_and_case(
    attribute: str, separators: list[str], upper: bool
) -> None:
    parts = attribute.split("_")
    name = parts[0] + "".join(s + part for s, part in zip(separators, parts[1:], strict=False))
    value = Settings().as_mapping()[attribute.replace("_", ".")]
    assert from_job({name.upper() if upper else name: value}) == Settings()


@pytest.mark.parametrize(
    ("name", "value", "attribute", "expected"),
    [
        ("commit.interval.ms", 50, "commit_interval_max_ms", 50),
        ("kafka.consumer.isolation-level", "read-uncommitted", "isolation_level", "read-uncommitted"),
        ("isolation.level", "READ_UNCOMMITTED", "isolation_level", "read-uncommitted"),
        ("kafka.isolation.level", "read_uncommitted", "isolation_level", "read-uncommitted"),
        ("kafka.bootstrap.servers", "a:1", "bootstrap_servers", "a:1"),
        ("brokers", ["a:1", "b:2"], "bootstrap_servers", "a:1,b:2"),
        ("processing.guarantee", "exactly_once_v2", "processing_guarantee", "exactly-once"),
        ("processing.guarantee", "at_least_once", "processing_guarantee", "at-least-once"),
        ("kafka.transaction.timeout.ms", "2min", "transaction_timeout_ms", 120_000),
        ("insecure", "yes", "insecure", True),
        ("insecure", False, "insecure", False),
        ("source.gap", "continue", "source_gap", "continue"),
        ("sink.missing", "create", "sink_missing", "create"),
        ("replication.factor", "3", "replication_factor", 3),
        ("state.dir", Path("/data"), "state_dir", str(Path("/data"))),
    ],
)
def test_spellings_and_aliases(name: str, value: Any, attribute: str, expected: Any) -> None:
    assert getattr(from_job({name: value}), attribute) == expected


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("commit.intervall.max.ms", "commit.interval.max.ms"),
        ("worker", "workers"),
        ("kafka_bootstrap", None),
        ("snapshot.intervall.ms", "snapshot.interval.ms"),
        ("transactional.timeout.ms", "transaction.timeout.ms"),
        ("schema.registry.urls", "schema.registry.url"),
        ("schema.registry.basic.auth.userinfo", "schema.registry.basic.auth.user.info"),
    ],
)
def test_misspelled_name_suggests_a_similar_one(name: str, near: str | None) -> None:
    if near is None:
        assert from_job({name: "x"}).kafka  # librdkafka judges what begins with kafka
    else:
        error = refused({name: 1})
        assert repr(name) in error.message
        assert near in error.remedy


def test_unknown_name_says_where_kafkas_own_settings_go() -> None:
    assert "kafka." in refused({"zzzzzzzz": 1}).remedy


@pytest.mark.parametrize("url", ["ann:hunter2@registry:8081", "http://a:8081,hunter2", "ftp://hunter2"])
def test_registry_that_is_no_url_is_refused_and_not_shown(url: str) -> None:
    error = refused({"schema.registry.url": url})
    assert error.message == "schema.registry.url in the job file isn't a URL."
    assert "hunter2" not in error.remedy


def test_registries_may_be_several() -> None:
    several = "http://a:8081, https://b"
    assert from_job({"schema.registry.url": several}).schema_registry == {"url": several}


def test_bad_value_names_its_origin(tmp_path: Path) -> None:
    toml = tmp_path / "fcluster.toml"
    toml.write_text("workers = 0\n")
    assert "in the job file" in refused({"workers": "many"}).message
    assert "FCLUSTER_WORKERS" in refused(env={"FCLUSTER_WORKERS": "many"}).message
    assert "flags" in refused(flags={"workers": -1}).message
    with pytest.raises(SettingsError, match=r"fcluster\.toml is not a whole number from 1"):
        resolve({}, toml, {}, {})


@pytest.mark.parametrize(
    "job",
    [
        {"workers": 0},
        {"workers": True},
        {"workers": 1.5},
        {"workers": "1e3"},
        {"replication.factor": 0},
        {"replication.factor": -2},
        {"commit.interval.max.ms": "soon"},
        {"commit.interval.max.ms": -1},
        {"commit.interval.max.ms": 0},
        {"commit.interval.max.ms": "999d"},
        {"processing.guarantee": "exactly-twice"},
        {"isolation.level": "serializable"},
        {"source.gap": "skip"},
        {"sink.missing": "skip"},
        {"insecure": "perhaps"},
        {"bootstrap.servers": 5},
        {"state.dir": None},
        {"kafka.fetch.min.bytes": [1]},
        {"kafka.fetch.min.bytes": None},
    ],
)
def test_values_out_of_range_or_kind_are_refused(job: Mapping[str, Any]) -> None:
    (name,) = job
    assert name in refused(job).message


@pytest.mark.parametrize(
    "name",
    [
        "FCLUSTER_SERVICE_HOST",
        "FCLUSTER_PORT",
        "FCLUSTER_PORT_7000_TCP_ADDR",
        "FCLUSTER_COORDINATOR_SERVICE_PORT_ADMIN",
        "FCLUSTER_COORDINATOR_PORT",
        "FCLUSTER_TEST_BROKERS",
        "FCLUSTER__SLOT",
        "FCLUSTER_CACHE_DIR",
    ],
)
def test_variables_of_kubernetes_and_tests_are_not_settings(name: str) -> None:
    assert resolve({}, None, {name: "tcp://10.0.0.1:7000"}, {}) == Settings()


def test_misspelled_environment_variable_is_refused() -> None:
    assert "FCLUSTER_WORKRES" in refused(env={"FCLUSTER_WORKRES": "1"}).message


# --- durations ------------------------------------------------------------------------------------------


@given(
    st.integers(0, 10_000),
    st.sampled_from(
        [("", 1), ("ms", 1), ("s", 1000), ("min", 60_000), ("m", 60_000), ("h", 3_600_000), ("d", 86_400_000)]
    ),
    st.sampled_from(["", " "]),
)
def test_duration_with_a_unit_is_that_many_milliseconds(number: int, unit: tuple[str, int], gap: str) -> None:
    assert parse_duration_ms(f"{number}{gap}{unit[0]}") == number * unit[1]
    assert parse_duration_ms(f"{number}{gap}{unit[0].upper()}") == number * unit[1]


@given(st.integers(0, 2**31))
def test_duration_as_a_number_is_milliseconds(number: int) -> None:
    assert parse_duration_ms(number) == parse_duration_ms(str(number)) == number


@given(st.text(max_size=12))
def test_any_text_is_a_duration_or_a_value_error(text: str) -> None:
    try:
        assert parse_duration_ms(text) >= 0
    except ValueError:
        assert not text.strip().isascii() or not text.strip().isdigit()


def test_fractions_of_a_second_are_exact_or_refused() -> None:
    assert parse_duration_ms("1.5s") == 1500
    assert parse_duration_ms("0.001s") == 1
    for wrong in ("0.0005s", "1.5ms", "1.5", True, 1.5, None, "-1s", "1 week", "", "s"):
        with pytest.raises(ValueError, match="not a duration"):
            parse_duration_ms(wrong)


# --- cross-checks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "job",
    [
        {"commit.interval.min.ms": 200, "commit.interval.max.ms": 100},
        {"heartbeat.interval.ms": 3000, "session.timeout.ms": 3000},
        {"checkpoint.straggler.ms": 5000, "checkpoint.timeout.ms": 1000},
        {"transaction.timeout.ms": 31_000},
        {"transaction.timeout.ms": 60_000, "checkpoint.timeout.ms": 60_000},
    ],
)
def test_settings_that_contradict_each_other_are_refused_with_both_origins(job: Mapping[str, Any]) -> None:
    message = refused(job).message
    for name, value in job.items():
        assert f"{name} = {value} (in the job file)" in message


def test_contradiction_between_origins_names_each() -> None:
    message = refused({"heartbeat.interval.ms": 900}, {"FCLUSTER_SESSION_TIMEOUT_MS": "800"}).message
    assert "heartbeat.interval.ms = 900 (in the job file)" in message
    assert "session.timeout.ms = 800 (in the environment variable FCLUSTER_SESSION_TIMEOUT_MS)" in message


@pytest.mark.parametrize(
    ("job", "followed"),
    [
        ({"commit.interval.ms": 5}, ("commit_interval_min_ms", 5)),
        ({"commit.interval.min.ms": 5000}, ("commit_interval_max_ms", 5000)),
        ({"session.timeout.ms": 600}, ("heartbeat_interval_ms", 200)),
        ({"heartbeat.interval.ms": "2s"}, ("session_timeout_ms", 6000)),
        ({"checkpoint.timeout.ms": "2min"}, ("transaction_timeout_ms", 431_000)),
    ],
)
def test_default_follows_what_was_set(job: Mapping[str, Any], followed: tuple[str, int]) -> None:
    assert getattr(from_job(job), followed[0]) == followed[1]


@given(
    st.dictionaries(
        st.sampled_from([name for name in ATTRIBUTES if name.endswith("_ms")]),
        st.integers(0, 200_000),
        max_size=5,
    )
)
def test_resolved_intervals_are_consistent_or_refused(job: dict[str, int]) -> None:
    try:
        settings = from_job(job)
    except SettingsError:
        return
    assert settings.commit_interval_min_ms <= settings.commit_interval_max_ms
    assert settings.heartbeat_interval_ms < settings.session_timeout_ms
    assert settings.checkpoint_straggler_ms <= settings.checkpoint_timeout_ms
    assert settings.transaction_timeout_ms > settings.commit_interval_max_ms + settings.checkpoint_timeout_ms
    assert all(getattr(settings, name) == value for name, value in job.items())


# --- kafka's own ----------------------------------------------------------------------------------------


def test_kafka_settings_are_passed_through_from_every_origin(tmp_path: Path) -> None:
    toml = tmp_path / "fcluster.toml"
    toml.write_text(
        '[kafka]\n"fetch.min.bytes" = 1\nsasl.username = "me"\n'
        'consumer.isolation-level = "read-uncommitted"\n'
    )
    env = {"FCLUSTER_KAFKA_SASL_PASSWORD": "hidden", "FCLUSTER_KAFKA_LOG_LEVEL": "3"}
    settings = resolve(
        {"kafka.socket.keepalive.enable": True}, toml, env, {"kafka.consumer.fetch.min.bytes": 2}
    )
    assert settings.isolation_level == "read-uncommitted"
    assert settings.kafka == {
        "socket.keepalive.enable": "true",
        "fetch.min.bytes": "1",
        "sasl.username": "me",
        "sasl.password": "hidden",
        "log_level": "3",
        "consumer.fetch.min.bytes": "2",
    }


@pytest.mark.parametrize(
    "name",
    [
        "kafka.group.id",
        "kafka.consumer.auto.offset.reset",
        "kafka.producer.transactional.id",
        "kafka.enable.auto.commit",
    ],
)
def test_kafka_settings_that_fcluster_decides_are_refused_with_the_reason(name: str) -> None:
    error = refused({name: "x"})
    assert name in error.message
    assert "can't be set:" in error.message


def test_partitioner_that_ignores_keys_is_refused() -> None:
    assert from_job({"kafka.partitioner": "consistent_random"}).kafka == {"partitioner": "consistent_random"}
    refused({"kafka.partitioner": "random"})


# --- files, secrets, copies -----------------------------------------------------------------------------


def test_missing_and_broken_toml_are_refused_by_name(tmp_path: Path) -> None:
    broken = tmp_path / "broken.toml"
    broken.write_text("state.dir = here\n")
    for path in (tmp_path / "missing.toml", broken):
        with pytest.raises(SettingsError, match=path.name):
            resolve({}, path, {}, {})


def test_default_toml_is_the_file_if_there_is_one(tmp_path: Path) -> None:
    assert default_toml(tmp_path) is None
    (tmp_path / "fcluster.toml").write_text("")
    assert default_toml(tmp_path) == tmp_path / "fcluster.toml"


@given(st.text(string.ascii_letters + string.digits, min_size=6))
def test_secrets_appear_nowhere_but_in_the_clients_configuration(secret: str) -> None:
    settings = from_job(
        {
            "kafka.sasl.password": f"S3cret-{secret}",
            "kafka.ssl.key.password": f"S3cret-{secret}",
            "kafka.sasl.jaas.config": f"S3cret-{secret}",
            "kafka.sasl.oauthbearer.config": f"S3cret-{secret}",
            "schema.registry.basic.auth.user.info": f"me:S3cret-{secret}",
            "schema.registry.url": f"https://me:S3cret-{secret}@registry:8081",
            "snapshots": f"s3://me:S3cret-{secret}@store/bucket",
        }
    )
    assert settings.kafka["sasl.password"] == f"S3cret-{secret}"
    redacted = settings.redacted()
    assert "S3cret" not in str(redacted)
    assert redacted["kafka.sasl.password"] == REDACTED
    assert redacted["schema.registry.url"] == f"https://{REDACTED}@registry:8081"
    assert redacted["snapshots"] == f"s3://{REDACTED}@store/bucket"
    assert redacted["workers"] == "4"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://me:p@ss@registry:8081", f"https://{REDACTED}@registry:8081"),
        ("https://me:p@@@registry:8081/", f"https://{REDACTED}@registry:8081/"),
        ("https://me:p/a?s#s@registry:8081", f"https://{REDACTED}@registry:8081"),
        ("https://me:pa ss\n@registry", f"https://{REDACTED}@registry"),
        ("https://to@ken@registry", f"https://{REDACTED}@registry"),
        ("https://:p@ss@registry", f"https://{REDACTED}@registry"),
        ("http://a:1@x@one:1,http://b:2@y@two:2", f"http://{REDACTED}@one:1,http://{REDACTED}@two:2"),
        ("http://one:1, http://b:2@y@two:2", f"http://one:1, http://{REDACTED}@two:2"),
        ("s3://bucket/some@prefix", "s3://bucket/some@prefix"),
        ("http://one:8081,http://two:8081", "http://one:8081,http://two:8081"),
    ],
)
def test_password_in_a_url_is_hidden_as_a_whole(url: str, shown: str) -> None:
    assert redact("schema.registry.url", url) == shown


def test_bad_secret_is_not_shown() -> None:
    assert "hunter2" not in str(refused({"kafka.sasl.password": ["hunter2"]}))


def test_repr_shows_no_secrets() -> None:
    settings = from_job({"kafka.sasl.password": "hunter2", "snapshots": "s3://me:hunter2@store/bucket"})
    assert "hunter2" not in repr(settings)
    assert "s3://" in repr(settings)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "workers": st.integers(1, 100),
            "insecure": st.booleans(),
            "commit.interval.max.ms": st.integers(1, 20_000),
            "state.dir": st.text(string.ascii_letters + "/._ ", min_size=1).filter(str.strip),
            "kafka.client.rack": st.text(string.ascii_letters, min_size=1),
            "schema.registry.timeout": st.floats(0.5, 10) | st.integers(1, 10),
        },
    )
)
def test_settings_handed_on_as_flags_are_equal(job: dict[str, Any]) -> None:
    settings = from_job(job)
    assert resolve({}, None, {}, settings.as_mapping()) == settings


def test_changed_copy_keeps_the_rest() -> None:
    settings = from_job({"workers": 2})
    assert with_settings(settings, bootstrap_servers="a:1") == from_job({"workers": 2, "brokers": "a:1"})


def test_isolation_spellings() -> None:
    assert isolation_from("READ_COMMITTED") == isolation_from("read-committed") == "read-committed"
    assert isolation_from("committed") is None
    assert isolation_from(None) is None
