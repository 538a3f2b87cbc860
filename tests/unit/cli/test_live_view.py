from __future__ import annotations

import io
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fcluster.cli.live_view import (
    SHARDS_SHOWN_MAX,
    LiveView,
    PlainView,
    ShardRates,
    agents_line,
    is_trouble,
    print_status,
    shard_columns,
    shards_table,
    stopped_lines,
    styled_line,
    summary_line,
    table_lines,
    time_lines,
    totals_of,
)


def worker(slot: int, **changes: Any) -> dict[str, Any]:
    return {
        "slot": slot,
        "worker": f"w{slot}-abcdefghijkl",
        "host": "host",
        "pid": 100 + slot,
        "phase": "running",
        "last_heard_ms": 12,
        "records_in_per_second": 1000.0,
        "records_out_per_second": 500.0,
        "commit_latency_ms_p50": 10.0 + slot,
        "commit_latency_ms_p99": 40.0 + slot,
        "shards": 2,
        **changes,
    }


def shard(partition: int, **changes: Any) -> dict[str, Any]:
    return {
        "stage": "flights",
        "partition": partition,
        "slot": partition % 2,
        "phase": "running",
        "position": 100,
        "committed": 90,
        "end": 150,
        "lag": 50,
        "epoch": 7,
        **changes,
    }


def document(**changes: Any) -> dict[str, Any]:
    return {
        "job": "carrier-delays",
        "term": 1,
        "epoch": 1234,
        "phase": "running",
        "interval_ms": 20,
        "oldest_open_epoch": None,
        "workers": [worker(0), worker(1)],
        "shards": [shard(n) for n in range(4)],
        "counters": {},
        **changes,
    }


def printed(doc: dict[str, Any]) -> str:
    stream = io.StringIO()
    print_status(doc, stream)
    return stream.getvalue()


# --- totals ----------------------------------------------------------------------------------------------


def test_totals_add_up_workers_and_shards() -> None:
    totals = totals_of(document())
    assert totals.records_in_per_second == 2000
    assert totals.records_out_per_second == 1000
    assert totals.lag == 200
    assert totals.commit_ms_p99 == 41
    assert (totals.workers_running, totals.workers, totals.shards_running, totals.shards) == (2, 2, 4, 4)
    assert not totals.caught_up


def test_lag_is_unknown_while_that_of_a_shard_is() -> None:
    assert totals_of(document(shards=[shard(0), shard(1, lag=-1)])).lag == -1


def test_caught_up_means_no_lag_at_all() -> None:
    assert totals_of(document(shards=[shard(0, lag=0)])).caught_up
    assert not totals_of(document(shards=[])).caught_up


def test_summary_is_one_line_with_what_matters() -> None:
    line = summary_line(document(), restarts=2)
    assert line == (
        "epoch 1,234  in 2,000/s  out 1,000/s  lag 200  commit p50 11 ms p99 41 ms  workers 2/2  shards 4/4"
        "  restarts 2"
    )


def test_long_open_epoch_names_the_workers_that_delay_it() -> None:
    line = summary_line(document(oldest_open_epoch={"epoch": 5, "age_ms": 4200, "waiting_for": [3, 1]}), 0)
    assert line.endswith("an epoch has been open for 4.2 s, held back by 3, 1")


def test_record_that_takes_long_is_named_with_its_worker() -> None:
    record = {"topic": "in", "partition": 2, "offset": 7, "running_ms": 4200, "slot": 1}
    open_epoch = {"epoch": 5, "age_ms": 4200, "waiting_for": [1]}
    line = summary_line(document(oldest_open_epoch=open_epoch, longest_record=record), 0)
    assert line.endswith("slot 1 has been processing record in/2 at offset 7 for 4.2 s")


def test_ordinary_open_epoch_is_not_mentioned() -> None:
    line = summary_line(document(oldest_open_epoch={"epoch": 5, "age_ms": 40, "waiting_for": [1]}), 0)
    assert "held back" not in line


junk = st.recursive(
    st.none() | st.integers() | st.text(max_size=3) | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from([*document(), "other"]), junk))
def test_views_accept_any_document(doc: dict[str, Any]) -> None:
    summary_line(doc, 0)
    printed(doc)
    ShardRates().update(doc, 1.0)


# --- tables ----------------------------------------------------------------------------------------------


def test_status_shows_each_worker_and_shard() -> None:
    text = printed(document())
    assert "carrier-delays  running  epoch 1,234" in text
    for name in ("w0-abcde@host", "w1-abcde@host", "flights/0", "flights/3"):
        assert name in text
    assert "\x1b" not in text


def test_status_shows_where_the_time_of_an_epoch_goes() -> None:
    phases = {"open": {"ms_p50": 10.04, "ms_p99": 20.0}, "commit": {"ms_p50": 0.4, "ms_p99": 1.25}}
    text = printed(document(workers=[worker(0, epoch_phases=phases), worker(1)]))
    rows = [line.split() for line in text.splitlines()]
    assert ["epoch:", "ms", "p50/p99", "slot", "0"] in rows
    assert ["open", "10.0/20.0"] in rows
    assert ["commit", "0.4/1.2"] in rows
    assert "epoch: ms" not in printed(document())


def test_status_shows_that_records_wait_for_a_service() -> None:
    wait = "map_async 'score': the circuit is open, the next call in 7 s (ConnectionError: refused)"
    assert f"slot 1: {wait}" in printed(document(workers=[worker(0), worker(1, calls_wait=wait)]))


def test_shard_that_does_not_run_shows_its_phase() -> None:
    assert "flights/0 restoring" in printed(document(shards=[shard(0, phase="restoring")]))


def test_names_with_brackets_are_printed_as_they_are() -> None:
    text = printed(document(workers=[worker(0, host="[red]h")], shards=[shard(0, stage="[bold]s")]))
    assert "[red]h" in text
    assert "[bold]s/0" in text


def test_many_shards_show_those_that_lag_most_and_how_many_are_hidden() -> None:
    shards = [shard(n, lag=n) for n in range(1000)]
    stream = io.StringIO()
    table = shards_table(document(shards=shards), None, 2, 500)
    Console(file=stream, width=200).print(table)
    assert "flights/999" in stream.getvalue()
    assert f"... and {1000 - SHARDS_SHOWN_MAX} more" in stream.getvalue()


def test_shards_are_side_by_side_only_on_a_wide_terminal() -> None:
    assert shard_columns(document(), 60) == 1
    assert shard_columns(document(), 200) == 3


def test_rate_of_a_shard_comes_from_its_positions() -> None:
    rates = ShardRates()
    for second in range(5):
        rates.update(document(shards=[shard(0, position=1000 * second)]), float(second))
    assert rates.rate("flights", 0) == 1000
    assert rates.rate("flights", 1) == -1


def test_rate_of_a_shard_that_fell_back_is_never_negative() -> None:
    rates = ShardRates()
    for second, position in enumerate((1000, 2000, 500, 600)):
        rates.update(document(shards=[shard(0, position=position)]), float(second))
    assert rates.rate("flights", 0) == 100


# --- views -----------------------------------------------------------------------------------------------


def test_plain_view_aligns_names_and_adds_no_colours_off_a_terminal() -> None:
    stream = io.StringIO()
    view = PlainView(stream)
    view.line("coordinator", "hello")
    view.line("worker-0", "hello")
    assert stream.getvalue() == "coordinator | hello\nworker-0    | hello\n"


def test_plain_view_summarises_only_when_something_changed() -> None:
    stream = io.StringIO()
    view = PlainView(stream, summary_interval_s=0.0)
    view.document(document(), 0)
    view.document(document(epoch=1235), 0)  # a new epoch number alone isn't progress
    assert stream.getvalue().count("cluster") == 1
    view.document(document(shards=[shard(0, position=101)]), 0)
    view.document(document(shards=[shard(0, position=101)]), 1)
    assert stream.getvalue().count("cluster") == 3


def test_plain_view_summarises_no_more_often_than_its_interval() -> None:
    stream = io.StringIO()
    view = PlainView(stream, summary_interval_s=3600.0)
    for position in range(5):
        view.document(document(shards=[shard(0, position=position)]), 0)
    assert stream.getvalue().count("cluster") == 1


def test_plain_view_survives_a_closed_pipe() -> None:
    stream = io.StringIO()
    view = PlainView(stream)
    stream.close()
    view.line("worker-0", "hello")


def test_agents_are_shown_with_their_running_and_wanted_workers() -> None:
    agents = [
        {"host": "h1", "pid": 7, "running": 2, "target": 2, "wanted": -1},
        {"host": "h2", "pid": 8, "running": 1, "target": 1, "wanted": 3},
    ]
    assert agents_line({"agents": agents}) == "agents (workers running/wanted)  h1:7 2/2  h2:8 1/3"
    assert agents_line({"agents": agents * 5}).endswith("  and 2 more")
    assert agents_line({"agents": [{}]}) == "agents (workers running/wanted)  -:- ?/?"
    assert agents_line({}) == ""


def test_live_view_leaves_its_last_state_and_the_lines_about_trouble() -> None:
    stream = io.StringIO()
    view = LiveView(stream)
    view.line("worker-0", "2026-01-01T00:00:00.000Z ERROR   x: it broke")
    view.document(document(), 3)
    view.line("worker-1", "2026-01-01T00:00:00.000Z INFO    x: going on")
    view.close()
    text = stream.getvalue()
    assert "it broke" in text
    assert "restarts 3" in text
    assert "going on" in text
    view.close()


def test_live_view_survives_a_terminal_that_was_closed() -> None:
    stream = io.StringIO()
    view = LiveView(stream)
    stream.close()
    view.line("worker-0", "error: it broke")
    view.document(document(), 0)
    view.close()


def test_log_line_is_shown_as_text_without_control_characters() -> None:
    assert styled_line("worker-0", "[red]a\x1b[2Jb").plain == "worker-0    | [red]a [2Jb"


def test_log_line_of_the_live_view_leaves_out_date_and_logger() -> None:
    line = styled_line("worker-0", "2026-01-01T01:02:03.456Z INFO    fcluster.worker: joined: ok").plain
    assert line == "worker-0    | 01:02:03 joined: ok"
    line = styled_line("worker-0", "2026-01-01T01:02:03.456Z WARNING fcluster.worker: lost").plain
    assert line == "worker-0    | 01:02:03 WARNING lost"
    assert styled_line("worker-0", "printed by a handler").plain == "worker-0    | printed by a handler"


def test_trouble_is_recognised_by_its_level() -> None:
    assert is_trouble("2026-01-01T00:00:00.000Z ERROR   x: y")
    assert is_trouble("error: it can't")
    assert not is_trouble("2026-01-01T00:00:00.000Z INFO    x: no error: fine")


def test_restoring_worker_shows_the_remaining_bytes_and_time() -> None:
    restoring = worker(
        1, phase="restoring", restore_bytes=120_000_000, restore_bytes_left=340_000_000, restore_ms_left=4200
    )
    assert "restoring 120 MB, 340 MB (4 s) to go" in printed(document(workers=[restoring]))
    unknown = restoring | {"restore_bytes_left": -1, "restore_ms_left": -1}
    assert "restoring 120 MB" in printed(document(workers=[unknown]))


def test_shard_that_is_warmed_elsewhere_counts_as_running() -> None:
    assert totals_of(document(shards=[shard(0, phase="warming")])).shards_running == 1


# --- stopped shards --------------------------------------------------------------------------------------


def test_stopped_shards_are_named_with_the_reason_and_what_to_do() -> None:
    reason = "Kafka has torn a transaction of flights/1; remedy: start with --set torn.transaction=offsets"
    shards = [shard(n, phase="stopped", stopped_reason=f"{reason} {n}") for n in range(5)]
    shown = " ".join(printed(document(shards=[*shards, shard(5, stopped_reason="")])).split())
    assert f"flights/0 is stopped: {reason} 0" in shown
    assert "and 2 more" in shown
    assert "stopped 5" in summary_line(document(shards=shards), 0)


def test_stopped_shard_with_a_hostile_reason_is_shown_in_one_bounded_line() -> None:
    lines = stopped_lines(document(shards=[shard(0, phase="stopped", stopped_reason="x\x1b[2J\n" * 10_000)]))
    assert len(lines) == 1
    assert len(lines[0]) < 1_300
    assert "\x1b" not in lines[0]


def test_wait_for_kafka_is_shown_with_the_worker_that_delays_the_epoch() -> None:
    said = "waiting for Kafka: partition flights/3 has no leader (12 s)"
    oldest = {"epoch": 9, "age_ms": 13_000, "waiting_for": ["slot 0 (preparing)"]}
    troubled = document(kafka_troubles=[said, 7, "x" * 10_000], oldest_open_epoch=oldest)
    shown = " ".join(printed(troubled).split())
    assert said in shown
    assert "held back by slot 0 (preparing)" in shown
    assert said in summary_line(troubled, 0)
    assert len(summary_line(troubled, 0)) < 1_000
    assert "waiting for Kafka" not in printed(document())


def test_event_time_has_a_line_for_each_stage_with_what_delays_it_and_what_is_idle() -> None:
    times: list[dict[str, Any]] = [
        {
            "stage": "orders",
            "time_ms": 1_767_225_600_000,
            "behind_ms": 1_500,
            "held_back_by": {"topic": "orders", "partition": 3, "upstream": -1},
            "ahead": [
                {"topic": "orders", "partition": number, "ahead_ms": ahead_ms, "ahead_of": "orders/3"}
                for number, ahead_ms in ((7, 720_000), (8, 2_500), (9, 0))
            ],
            "ahead_inputs": 4,
            "idle": [{"topic": "orders", "partition": number} for number in range(6)],
            "idle_inputs": 6,
            "idle_upstream": 0,
            "timers": -1,
        },
        {
            "stage": "per-shop",
            "time_ms": -1,
            "behind_ms": -1,
            "held_back_by": {"topic": "repartition", "partition": 0, "upstream": 3},
            "idle": [],
            "idle_inputs": 0,
            "idle_upstream": 2,
            "timers": 1_204,
        },
    ]
    assert time_lines(document(event_times=times)) == [
        (
            "event time of orders: 2026-01-01 00:00:00 UTC, 1.5 s behind; waits for orders/3; "
            "held back: orders/7 (12 min ahead of orders/3), orders/8 (2.5 s ahead of orders/3), "
            "orders/9 (waits until orders/3 has begun) and 1 more; "
            "idle: orders/0, orders/1, orders/2, orders/3 and 2 more"
        ),
        (
            "event time of per-shop: none yet; waits for repartition/0 (shard 3 upstream); idle upstream: 2; "
            "1,204 timers set"
        ),
    ]
    assert time_lines(document()) == []


def test_stages_that_wait_for_global_tables_say_for_which_and_how_far_they_are() -> None:
    rates = {
        "table": "rates",
        "topic": "all-rates",
        "shards": 2,
        "shards_running": 2,
        "records_left": 1_200,
        "copies_left": 3,
    }
    shops = {**rates, "table": "shops", "shards_running": 1, "records_left": -1, "copies_left": 0}
    waits = [{"stage": "calls", "shards": 4, "shards_waiting": 3, "tables": [rates, shops]}]
    begin = "3 of 4 shards of calls wait for the global table"
    assert table_lines(document(table_waits=waits)) == [
        f"{begin} rates: 1,200 left to read in all-rates, 3 to copy",
        (
            f"{begin} shops: ? left to read in all-rates, 0 to copy; "
            "1 of 2 shards that read all-rates are running"
        ),
    ]
    assert begin in " ".join(printed(document(table_waits=waits)).split())
    assert table_lines(document()) == []
