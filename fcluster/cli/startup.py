"""What commands start with (the log, the job, the settings), and how they report a failure at the end.

Responsible for: what comes before and after the main work. Rule: mistakes are found in the foreground, before
any process is started. Must not parse options (`commands` does that). Must not start anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fcluster.cli.local_kafka import detached_kafka, no_brokers
from fcluster.common.failures import Failure, FailureKind
from fcluster.common.settings import Settings, resolve

if TYPE_CHECKING:
    from fcluster.api.job import Job


def start_logging(level: str) -> None:
    """Set up this process's log."""
    from fcluster.common.logs import configure_logging

    configure_logging(level)


def job_failure(failure: Failure | None) -> Failure:
    """Why the job failed, for the user's terminal. It always says what to do about it."""
    if failure is None:
        failure = Failure(FailureKind.OTHER, "the job failed")
    remedy = failure.remedy
    if failure.kind is FailureKind.RECORD:
        remedy = remedy or "Correct the job, or give the step an on_error ('skip', or a dead-letter topic)."
        remedy = (
            f"{remedy[:1].upper()}{remedy[1:].rstrip('.')}. Then start the job again: nothing beyond that "
            "record is committed."
        )
    remedy = remedy or "Nothing is lost. Fix the cause, then start the job again."
    return Failure(failure.kind, failure.message, remedy, failure.where)


def load(
    target: str, flags: Mapping[str, str], config: Path | None, env: Mapping[str, str]
) -> tuple[Job, Settings]:
    """The job and its settings.

    Raises:
        FclusterError: the job can't be loaded, a setting is wrong, or there are no brokers.
    """
    from fcluster.api.loader import load_job

    job = load_job(target)
    return job, with_known_brokers(resolve(job.settings, config, env, flags))


def with_known_brokers(settings: Settings, *, or_offline: bool = False) -> Settings:
    """The settings. If they name no brokers, those that run in the data directory are meant.

    Args:
        settings: the resolved settings.
        or_offline: whether the command could do without brokers. The remedy says so.

    Raises:
        NoBrokers: there are none.
    """
    if settings.bootstrap_servers:
        return settings
    servers = detached_kafka(Path(settings.state_dir))
    if servers is None:
        raise no_brokers(Path(settings.state_dir), or_offline=or_offline)
    return replace(settings, bootstrap_servers=servers)


def data_directory(flags: Mapping[str, str], config: Path | None, env: Mapping[str, str]) -> Path:
    """The data directory, according to options, environment and settings file."""
    return Path(resolve({}, config, env, flags).state_dir)
