"""The demo on real processes, twice in a row, and from an installed wheel in a new environment."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from examples.flights import flights
from examples.flights.load import load_flights
from examples.flights.recount import differences, recount_csv
from tests.checker.check import check_totals
from tests.checker.generate import create_topic, write_records
from tests.checker.reading import READ_UNCOMMITTED, committed_offsets, end_offsets
from tests.checker.records import generate_records
from tests.harness import REPOSITORY, Up, processes_with, wait_until
from tests.in_driver import by_key, rows_in_driver, rows_on_kafka, run_in_driver

pytestmark = pytest.mark.timeout(300)
ROWS = 3000
DEMO_TIMEOUT_S = 100
JOBS = Path(__file__).parents[1] / "jobs"


def run_demo(brokers: str, data_dir: Path, rows: int = ROWS) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "examples/flights/demo.py"), "--rows", str(rows)]
    command += ["--brokers", brokers, "--data-dir", str(data_dir), "--workers", "2"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=data_dir.parent,
        start_new_session=True,  # so that the job's processes can be ended with it
    )
    try:
        out, err = process.communicate(timeout=DEMO_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise TimeoutError(f"the demo still runs after {DEMO_TIMEOUT_S} s:\n{out}{err}") from None
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.fixture
def own_kafka(tmp_path: Path):
    """A separate broker, because the demo's topics have fixed names."""
    from fcluster.kafka.embedded import EmbeddedKafka

    broker = EmbeddedKafka(tmp_path / "kafka")
    try:
        yield broker.start()
    finally:
        broker.stop()


def test_demo_run_twice_in_a_row_agrees_with_the_recount_both_times(own_kafka: str, tmp_path: Path) -> None:
    data_dir = tmp_path / "demo"
    data_dir.mkdir()
    first = run_demo(own_kafka, data_dir)
    assert first.returncode == 0, first.stdout + first.stderr
    assert f"a recount of {ROWS:,} flights" in first.stdout
    second = run_demo(own_kafka, data_dir)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "already" in second.stdout
    assert not processes_with(str(data_dir))
    assert_driver_agrees(own_kafka)


def assert_driver_agrees(brokers: str) -> None:
    """Check that the job in `fcluster.testing` writes the same for the same flights as the demo did."""
    driver = run_in_driver(flights.job, brokers, ["flights"])
    carriers = by_key(rows_on_kafka(brokers, "carrier-totals"))
    assert by_key(rows_in_driver(driver, "carrier-totals")) == carriers
    aircraft = by_key(rows_on_kafka(brokers, "aircraft-totals"))
    ours = by_key(rows_in_driver(driver, "aircraft-totals"))
    # An aircraft's flights come from several partitions, in any order, so only the last line is the same.
    assert {key: len(lines) for key, lines in ours.items()} == {key: len(it) for key, it in aircraft.items()}
    for key, lines in aircraft.items():
        assert json.loads(ours[key][-1] or b"") == json.loads(lines[-1] or b"")


def test_flights_loaded_twice_are_written_once(kafka: str, topic_prefix: str) -> None:
    from rich.console import Console

    console = Console(quiet=True)
    assert load_flights(kafka, console, rows=500, topic=f"{topic_prefix}flights") == 500
    assert load_flights(kafka, console, rows=500, topic=f"{topic_prefix}flights") == 0
    assert load_flights(kafka, console, rows=200, topic=f"{topic_prefix}flights") == 200


def test_recount_of_a_wrong_total_fails_the_demo() -> None:
    by_carrier, _ = recount_csv(100)
    outputs = {
        key: [{**totals, "flights": number} for number in range(1, totals["flights"] + 1)]
        for key, totals in by_carrier.items()
    }
    assert differences("carrier", by_carrier, outputs) == []
    del outputs[next(iter(outputs))][0]
    assert differences("carrier", by_carrier, outputs) != []


def test_installed_wheel_runs_the_demo_job_in_a_fresh_environment(
    kafka: str, topic_prefix: str, tmp_path: Path
) -> None:
    """The wheel is installed without dependencies, which are on the path, and run from another directory."""
    from rich.console import Console

    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist")]
    built = subprocess.run([*build, str(REPOSITORY)], capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True, timeout=60)
    python = environment / "bin/python"
    target = next(environment.glob("lib/python*/site-packages"))
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index"]
    done = subprocess.run([*install, str(wheel)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    # Dependencies come from this environment, fcluster comes from the wheel: site-packages come first.
    ours = next(Path(path) for path in sys.path if path.endswith("site-packages"))
    (target / "dependencies.pth").write_text(f"{ours}\n")
    where = subprocess.run(
        [str(python), "-c", "import fcluster; print(fcluster.__file__)"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        check=True,
    )
    assert where.stdout.startswith(str(environment)), where.stdout
    load_flights(kafka, Console(quiet=True), rows=1000, topic=f"{topic_prefix}flights")
    job = tmp_path / "flights.py"
    text = (REPOSITORY / "examples/flights/flights.py").read_text()
    job.write_text(re.sub(r'(Job|topic)\("', rf"\g<0>{topic_prefix}", text))
    command = [str(environment / "bin/fcluster"), "up", str(job), "--brokers", kafka, "--workers", "2"]
    ran = subprocess.run(
        [*command, "--until-caught-up"], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    offsets = committed_offsets(kafka, f"{topic_prefix}flights-job")
    flights = sum(offset for (topic, _), offset in offsets.items() if topic == f"{topic_prefix}flights")
    assert flights == 1000


def test_ctrl_c_commits_the_last_epoch_and_leaves_no_process(
    kafka: str, topic_prefix: str, tmp_path: Path
) -> None:
    job, source, output = (f"{topic_prefix}{name}" for name in ("job", "in", "out"))
    create_topic(kafka, source, 4)
    create_topic(kafka, output, 4)
    env = {"FCLUSTER_TEST_JOB": job, "FCLUSTER_TEST_SOURCE": source, "FCLUSTER_TEST_OUTPUT": output}
    # So long that only the drain can have committed what is committed now.
    seldom = [f"--set=commit.interval.{bound}.ms=50000" for bound in ("min", "max")]

    def committed() -> int:
        return sum(committed_offsets(kafka, job).values())

    data_dir = tmp_path / "data"
    with Up(JOBS / "running_totals.py", kafka, data_dir, *seldom, workers=2, env=env) as up:
        write_records(kafka, source, generate_records(2000, keys=100))
        up.wait_until(lambda: written(kafka, output) >= 2000, "all records' outputs")
        before = committed()
        up.interrupt()
        ended = up.wait(30)
    assert ended.code == 0, ended.text
    assert "draining" in ended.text
    assert before < 2000, "an epoch was committed in between, so the drain had nothing to commit"
    assert committed() == 2000
    verdict = check_totals(kafka, job, source, output, title="drained")
    assert verdict.ok, verdict.report()
    wait_until(lambda: not processes_with(str(tmp_path / "data")), "all processes to end")


def written(brokers: str, topic: str) -> int:
    """How many offsets of the topic are used, by committed and uncommitted records."""
    return sum(end_offsets(brokers, [topic], READ_UNCOMMITTED).values())
