from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from fcluster.cli import local_kafka, startup, up
from fcluster.cli.ending import Session
from fcluster.cli.main import commands
from fcluster.common.errors import FclusterError, KafkaUnavailable
from fcluster.common.exit_codes import ExitCode
from fcluster.worker import handler_processes

ALL_COMMANDS = (
    ["new"],
    ["check"],
    ["up"],
    ["status"],
    ["consume"],
    ["produce"],
    ["kafka", "start"],
    ["kafka", "stop"],
    ["kafka", "status"],
    ["coordinator"],
    ["drain"],
    ["scale"],
    ["reset"],
    ["worker"],
)


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # It would leave a handler that writes to the closed stream of a finished test.
    monkeypatch.setattr(startup, "start_logging", lambda _level: None)
    # It would turn this process into a worker, and a guard would watch its next child.
    monkeypatch.setattr(handler_processes, "prepare", lambda: None)
    for name in list(os.environ):
        if name.startswith("FCLUSTER_"):
            monkeypatch.delenv(name)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(commands, list(arguments), obj=Session())


@pytest.mark.parametrize("command", ALL_COMMANDS, ids=" ".join)
def test_help_of_each_command_has_an_example(command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "Example" in result.output
    assert f"fcluster {' '.join(command)}" in result.output.split("Example", 1)[1]


@pytest.mark.parametrize("command", [[], *ALL_COMMANDS], ids=" ".join)
def test_help_loads_neither_the_kafka_client_nor_rich(command: list[str]) -> None:
    script = (
        "import sys\n"
        "from fcluster.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'confluent_kafka', 'rich', 'zmq', 'rocksdict'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(up.__file__).parents[2])}
    argv = [sys.executable, "-c", script, *command, "--help"]
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, env=environment)


def test_error_is_printed_in_two_lines_with_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    class PickyError(FclusterError):
        exit_code = 7

    def fail(*_: Any) -> None:
        raise PickyError("the sky is green", remedy="Paint it blue.")

    monkeypatch.setattr(startup, "data_directory", fail)
    result = run("kafka", "status")
    assert result.exit_code == 7
    assert result.stderr == "error: the sky is green\nremedy: Paint it blue.\n"
    assert result.stdout == ""


def test_error_with_debug_shows_the_traceback_before_the_two_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise FclusterError("the sky is green", remedy="Paint it blue.")

    monkeypatch.setattr(startup, "data_directory", fail)
    result = run("kafka", "status", "--debug")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert result.stderr.endswith("error: the sky is green\nremedy: Paint it blue.\n")


def test_unexpected_error_is_called_a_bug_and_its_traceback_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("impossible")

    (tmp_path / ".fcluster" / "logs").mkdir(parents=True)
    monkeypatch.setattr(local_kafka, "describe_kafka", fail)
    result = run("kafka", "status")
    assert result.exit_code == 70
    assert "Traceback" not in result.stderr
    assert "error: this is a bug in fcluster: RuntimeError: impossible" in result.stderr
    (kept,) = (tmp_path / ".fcluster" / "logs").glob("fcluster-crash-*.log")
    assert str(kept.relative_to(tmp_path)) in result.stderr
    assert "raise RuntimeError" in kept.read_text()


def test_brokers_that_are_down_are_a_temporary_failure_for_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise KafkaUnavailable("no brokers", remedy="Start them.")

    monkeypatch.setattr(startup, "load", fail)
    assert run("worker", "job.py").exit_code == 75
    assert run("coordinator", "job.py").exit_code == 75


def test_signal_while_the_interpreter_of_a_server_ends_does_not_change_its_exit_code() -> None:
    script = (
        "import os, signal, sys\n"
        "from fcluster.cli.main import main\n"
        "class Last:\n"
        "    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.SIGTERM): kill(pid, number)\n"
        # Modules are dropped after the interpreter has put the default handling of signals back.
        "sys.modules['last'] = Last()\n"
        "signal.signal(signal.SIGTERM, lambda *_: None)\n"
        "main(['worker', 'no-such-job.py'])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == ExitCode.MISTAKE, (done.returncode, done.stderr)
    assert "no-such-job.py" in done.stderr


def test_ctrl_c_ends_without_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(local_kafka, "describe_kafka", interrupt)
    result = run("kafka", "status")
    assert result.exit_code == 130
    assert result.output == ""


def test_misspelled_setting_suggests_the_right_one() -> None:
    result = run("status", "--set", "comit.interval.ms=5")
    assert result.exit_code == 1
    assert "comit.interval.ms" in result.stderr
    assert "commit.interval.ms" in result.stderr.split("remedy:")[1]


def test_setting_without_a_value_is_a_usage_error() -> None:
    result = run("status", "--set", "commit.interval.ms")
    assert result.exit_code == 2
    assert "'commit.interval.ms' is not of the form name=value" in result.stderr


def test_status_without_a_cluster_says_how_to_name_one() -> None:
    result = run("status")
    assert result.exit_code == 1
    assert result.stderr.startswith(
        "error: no cluster runs in .fcluster\nremedy: Start one with `fcluster up`"
    )


@pytest.mark.parametrize(
    "command", [["consume", "flights"], ["produce", "flights"], ["status", "--job", "x"]]
)
def test_command_without_brokers_says_how_to_get_some(command: list[str]) -> None:
    result = run(*command)
    assert result.exit_code == 1
    assert "error: no brokers are given" in result.stderr
    assert "remedy: Give --brokers" in result.stderr


def test_up_without_a_job_file_names_it() -> None:
    result = run("up", "nosuch.py")
    assert result.exit_code == 1
    assert "nosuch.py" in result.stderr
    assert "remedy:" in result.stderr


def test_options_become_settings_and_override_set(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[up.UpOptions] = []
    monkeypatch.setattr(up, "run_up", lambda options: seen.append(options) or 0)
    result = run(
        *("up", "flights.py", "--brokers", "h:9092", "--workers", "3", "--data-dir", "state"),
        *(
            "--snapshots",
            "snaps",
            "--until-caught-up",
            "--set",
            "workers=9",
            "--set",
            "commit.interval.ms=50",
        ),
    )
    assert result.exit_code == 0, result.output
    assert seen[0].until_caught_up
    assert seen[0].flags == {
        "bootstrap.servers": "h:9092",
        "workers": "3",
        "state.dir": "state",
        "snapshots": "snaps",
        "commit.interval.ms": "50",
    }


def test_settings_file_in_the_current_directory_is_used(tmp_path: Path) -> None:
    (tmp_path / "fcluster.toml").write_text('state.dir = "elsewhere"\n')
    assert "no cluster runs in elsewhere" in run("status").stderr


def test_settings_file_that_is_not_there_is_a_usage_error() -> None:
    assert run("status", "--config", "nosuch.toml").exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["8"], (8, {})),
        (["0"], (0, {})),
        (["host1=8", "host2:4711=0"], (-1, {"host1": 8, "host2:4711": 0})),
    ],
)
def test_scale_accepts_a_number_or_numbers_by_agent(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], wanted: tuple[int, dict[str, int]]
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        "fcluster.cli.operations.scale", lambda _line, total, places, **_more: asked.append((total, places))
    )
    assert run("scale", *arguments).exit_code == 0
    assert asked == [wanted]


@pytest.mark.parametrize(
    "arguments",
    [[], ["many"], ["-1"], ["h="], ["h=-1"], ["h=1", "2"], ["1", "2"], ["h=1", "h=2"], ["h=99999999"]],
)
def test_scale_to_something_else_than_a_number_is_a_usage_error(arguments: list[str]) -> None:
    assert run("scale", "--", *arguments).exit_code == 2


def test_agent_with_a_slot_is_a_usage_error() -> None:
    result = run("worker", "job.py", "--workers", "2", "--slot", "1")
    assert result.exit_code == 2
    assert "--slot is for one worker" in result.output


def test_version_is_printed() -> None:
    assert run("--version").output.startswith("fcluster ")


def test_kafka_status_of_a_stopped_broker_exits_with_1() -> None:
    result = run("kafka", "status")
    assert result.exit_code == 1
    assert result.output == "not running in .fcluster\n"


def test_kafka_stop_of_a_stopped_broker_is_not_an_error() -> None:
    result = run("kafka", "stop")
    assert result.exit_code == 0
    assert result.output == "not running\n"
