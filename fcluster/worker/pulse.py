"""The thread that never waits for the others. It sends heartbeats and notices when something hangs.

Responsible for: heartbeats while a handler runs; the limit on one record; regular checks of `watchdog` and
`kafka_waits`; and making a handler that holds the interpreter let this thread run (`interpreter_lock`).

Must not: wait for anything except time, or decide what to do about a record that has taken too long: the
process ends, and its shard's next owner is told.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from fcluster.common.exit_codes import ExitCode
from fcluster.common.failures import bounded_text
from fcluster.common.settings import Settings
from fcluster.wire import messages
from fcluster.worker import interpreter_lock
from fcluster.worker.core.state import CoreState
from fcluster.worker.health import WorkerHealth
from fcluster.worker.inbox import Inbox
from fcluster.worker.kafka_waits import KafkaWaits
from fcluster.worker.leader_link import LeaderLink
from fcluster.worker.processing import running_step
from fcluster.worker.record_watch import RecordWatch, Running, describe_overdue, frame_of
from fcluster.worker.reporting import Reporting
from fcluster.worker.running_shards import RunningShards
from fcluster.worker.watchdog import Watchdog

LAST_WORD_S = 0.3
"""How long the last message before the process ends may take to be sent."""
RECORD_WATCH_INTERVAL_S = 0.25
WAIT_S_MIN = 0.01


class PulseThread:
    """See the module's docstring. Create it in the main thread.

    Args:
        settings: the worker's settings.
        core_state: the core's state. It is only read.
        reporting: sends the heartbeats.
        inbox: interrupted when a record takes long.
        link: takes the last message.
        shards: the shards that are read.
        record_watch: knows the record that is being processed.
        watchdog: watches the other operations.
        kafka_waits: knows what waits for Kafka.
        health: learns that this thread runs.
        end: ends the process, with a reason and an exit code.
    """

    def __init__(
        self,
        settings: Settings,
        core_state: CoreState,
        reporting: Reporting,
        inbox: Inbox,
        link: LeaderLink,
        shards: RunningShards,
        record_watch: RecordWatch,
        watchdog: Watchdog,
        kafka_waits: KafkaWaits,
        health: WorkerHealth,
        end: Callable[[str, int], None],
    ) -> None:
        self._settings = settings
        self._core_state = core_state
        self._reporting = reporting
        self._inbox = inbox
        self._link = link
        self._shards = shards
        self._record_watch = record_watch
        self._watchdog = watchdog
        self._kafka_waits = kafka_waits
        self._health = health
        self._end = end
        self._main_thread = threading.get_ident()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)

    def start(self) -> None:
        """Start."""
        self._thread.start()

    def stop(self) -> None:
        """Send no more heartbeats. Doesn't wait for the thread."""
        self._stopping.set()

    def _run(self) -> None:
        interval_s = self._settings.heartbeat_interval_ms / 1000
        heartbeat_due_s = 0.0
        while not self._stopping.is_set():
            now_s = time.monotonic()
            interpreter_lock.put_off()
            self.watch_record(now_s)
            self._kafka_waits.check()
            if now_s >= heartbeat_due_s:
                heartbeat_due_s = now_s + interval_s
                self._reporting.send_heartbeat()
                self._watchdog.check()
                self._health.sent_heartbeat(interval_s)
            wake_s = min(heartbeat_due_s, now_s + RECORD_WATCH_INTERVAL_S)
            self._stopping.wait(max(WAIT_S_MIN, wake_s - time.monotonic()))
        interpreter_lock.rest()

    def watch_record(self, now_s: float) -> None:
        """Check how long the current record takes. If that is long, the chunk ends with it."""
        running = self._record_watch.sample(now_s, time.process_time())
        if self._record_watch.record is not None:
            self._inbox.interrupt()
        if running is not None and 0 < self._settings.record_bound_ms <= running.running_s * 1000:
            self._give_up_record(running)

    def _give_up_record(self, running: Running) -> None:
        """A handler can't be interrupted from outside, so end the process. The shard's next owner is told."""
        frame = frame_of(self._main_thread)
        reason = describe_overdue(running, self._settings, frame)
        topic, partition = running.record.topic() or "", running.record.partition() or 0
        runner = self._shards.routes.get(topic, {}).get(partition)
        offset = running.record.offset()
        if runner is not None and offset is not None:
            self._link.send(
                messages.RecordOverdue(
                    self._core_state.session,
                    runner.shard,
                    offset,
                    bounded_text(reason, 2_000),
                    bounded_text(running_step(frame), 1_000),
                    runner.number,
                )
            )
            time.sleep(LAST_WORD_S)
        self._end(reason, ExitCode.RECORD_OVERDUE)
