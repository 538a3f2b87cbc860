"""How every command ends: its messages, and its exit code.

Responsible for: turning each error into both. Rules: an error that a user can fix is two lines on stderr
(what happened, and the remedy); a traceback is shown only with `--debug`; the process that keeps this one
running is told what failed.
"""

from __future__ import annotations

import os
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from fcluster.common.errors import FclusterError, KafkaUnavailable
from fcluster.common.exit_codes import ExitCode
from fcluster.common.failures import Failure, FailureKind
from fcluster.host.failure_file import take_from_environment


@dataclass
class Session:
    """What error reporting needs to know about one run of the command."""

    debug: bool = False
    data_dir: Path | None = None
    is_server: bool = False
    """Whether this is a coordinator or a worker: its stderr is its log."""
    failure_file: Path | None = field(default_factory=take_from_environment)
    """Where the process that keeps this one running expects the reason of a failure."""


class Commands(click.Group):
    """A group that turns every error into a message and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        session = ctx.ensure_object(Session)
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except FclusterError as error:
            if session.debug:
                traceback.print_exc()
            report(session, Failure(error.kind, error.message, error.remedy, error.where))
            retriable = session.is_server and isinstance(error, KafkaUnavailable)
            ctx.exit(ExitCode.TEMPORARY if retriable else error.exit_code)
        except KeyboardInterrupt:
            ctx.exit(ExitCode.INTERRUPTED)
        except BrokenPipeError:
            _forget_stdout()
            ctx.exit(0)
        except Exception as error:  # noqa: BLE001
            _report_bug(session, error)
            ctx.exit(ExitCode.CRASHED)


def report(session: Session, failure: Failure) -> None:
    """Print an error the way all commands do, and tell it to the process that keeps this one running."""
    click.echo(f"error: {failure.message}", err=True)
    if failure.remedy:
        click.echo(f"remedy: {failure.remedy}", err=True)
    tell_keeper(session, failure)


def tell_keeper(session: Session, failure: Failure) -> None:
    """Report the failure to the process that keeps this one running, if there is one."""
    if session.failure_file is not None:
        from fcluster.host.failure_file import write_failure

        write_failure(session.failure_file, failure)


def _report_bug(session: Session, error: Exception) -> None:
    details = traceback.format_exc()
    if session.debug or session.is_server:
        click.echo(details, err=True, nl=False)
        where = "the traceback above"
    else:
        where = f"the traceback in {_keep_traceback(session, details)}"
    summary = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    message = f"this is a bug in fcluster: {summary}"
    report(session, Failure(FailureKind.BUG, message, f"Please report it with {where}."))


def _keep_traceback(session: Session, details: str) -> Path:
    import tempfile

    logs = session.data_dir / "logs" if session.data_dir is not None else None
    directory = logs if logs is not None and logs.is_dir() else Path(tempfile.gettempdir())
    path = directory / f"fcluster-crash-{os.getpid()}.log"
    try:
        path.write_text(details, encoding="utf-8")
    except OSError:
        click.echo(details, err=True, nl=False)
        return Path("stderr")
    return path


def _forget_stdout() -> None:
    """Redirect a closed stdout, so that the interpreter doesn't complain about it at exit."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(devnull, sys.stdout.fileno())
    except (OSError, ValueError):
        pass
    finally:
        os.close(devnull)
