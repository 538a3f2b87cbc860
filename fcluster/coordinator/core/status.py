"""The status document: the coordinator's view of the cluster, as data for JSON.

Responsible for: its structure, on which `fcluster status --json` and the live view rely. Must not change
anything. Must not contain secrets: settings are redacted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fcluster.coordinator.core.agents import Agents
from fcluster.coordinator.core.cluster import Cluster
from fcluster.coordinator.core.election import Roster
from fcluster.coordinator.core.event_times import describe_event_times
from fcluster.coordinator.core.model import EpochPhase, Session, Shard, ShardPhase
from fcluster.coordinator.core.progress import Progress
from fcluster.coordinator.core.rounds import Rounds
from fcluster.coordinator.core.table_waits import describe_table_waits
from fcluster.coordinator.core.takeovers import Takeovers
from fcluster.wire.messages import ShardStatus


def describe(
    cluster: Cluster,
    *,
    rounds: Rounds,
    progress: Progress,
    agents: Agents,
    standbys: Roster,
    takeovers: Takeovers,
    notices: Sequence[str] = (),
) -> dict[str, Any]:
    """The document. Times are in milliseconds, rates per second, and -1 means unknown."""
    settings, now_ms = cluster.settings, cluster.now_ms
    sessions = sorted(cluster.sessions.values(), key=lambda session: session.slot)
    keeper_of = agents.keeper_of(now_ms)
    topics = {stage.name: stage.topics for stage in cluster.terms.topology.stages}
    shards_of: dict[int, int] = {}
    for shard in cluster.shards.values():
        if shard.slot is not None:
            shards_of[shard.slot] = shards_of.get(shard.slot, 0) + 1
    return {
        "job": cluster.terms.topology.job,
        "topology": cluster.terms.topology.fingerprint,
        "version": cluster.terms.version,
        "guarantee": settings.processing_guarantee,
        "term": cluster.terms.term,
        "phase": _phase(cluster),
        "stop_reason": cluster.stop_reason,
        "failure": None if cluster.failure is None else cluster.failure.document(),
        "uptime_ms": round(now_ms - cluster.started_ms),
        "epoch": rounds.completed_epoch,
        "interval_ms": max((session.interval_ms for session in sessions), default=-1),
        "oldest_open_epoch": _oldest_open_epoch(sessions, now_ms),
        "longest_record": _longest_record(sessions, now_ms),
        "kafka_troubles": list(cluster.kafka_troubles),
        "expected_workers": cluster.terms.expected_workers,
        "workers": [
            _worker(session, shards_of.get(session.slot, 0), now_ms)
            | {"agent": keeper_of.get((session.host, session.pid), "")}
            for session in sessions
        ],
        "agents": agents.describe(now_ms),
        "waiting_to_join": len(cluster.joiners),
        "standbys": standbys.names(now_ms),
        "slots": [
            {
                "slot": slot.number,
                "fenced": slot.fenced,
                "fencing": slot.fencing or slot.fence_retry_ms is not None,
                "fence_failures": slot.fence_failures,
            }
            for slot in sorted(cluster.slots.values(), key=lambda slot: slot.number)
        ],
        "shards": [
            _shard(cluster, progress, shard, topics[shard.identity.stage])
            for shard in cluster.shards.values()
        ],
        "event_times": describe_event_times(
            cluster.terms.topology, (shard.identity for shard in cluster.shards.values()), progress
        ),
        "table_waits": describe_table_waits(cluster, progress),
        "targets": {
            topics[stage][number]: {str(partition): offset for partition, offset in targets.items()}
            for (stage, number), targets in progress.targets.items()
        },
        "run_end": None
        if cluster.run_end is None
        else {
            "end": cluster.run_end.text,
            "inputs": len([source for shard in cluster.shards for source in topics[shard.stage]]),
            "inputs_left": progress.inputs_behind,
            "records_left": progress.records_left,
        },
        "counters": _counters(cluster, rounds),
        "takeovers": [
            {"slot": one.slot, "shards": one.shards, "reason": one.reason, "steps_ms": one.steps()}
            for one in takeovers.over
        ],
        "moves": [
            {"stage": one.shard.stage, "partition": one.shard.partition, "steps_ms": one.steps()}
            for one in takeovers.moved
        ],
        "notices": list(notices),
        "settings": settings.redacted(),
    }


def _phase(cluster: Cluster) -> str:
    if cluster.assigning or cluster.phase.value != "running":
        return cluster.phase.value
    if cluster.awaits_sessions():
        return "adopting"
    return "waiting for workers"


def _counters(cluster: Cluster, rounds: Rounds) -> dict[str, int]:
    counters = cluster.counters
    return {
        "joins": counters.joins,
        "adoptions": counters.adoptions,
        "deaths": counters.deaths,
        "evictions": counters.evictions,
        "leaves": counters.leaves,
        "resets": counters.resets,
        "fences": counters.fences,
        "fence_failures": counters.fence_failures,
        "moves": counters.moves,
        "cold_moves": counters.cold_moves,
        "warm_takeovers": counters.warm_takeovers,
        "epochs": rounds.begun,
        "stragglers": rounds.stragglers,
        "malformed_frames": counters.malformed_frames,
        "unauthorised_frames": counters.unauthorised_frames,
        "failed_handshakes": counters.failed_handshakes,
        "torn_transactions": counters.torn_transactions,
    }


def _oldest_open_epoch(sessions: list[Session], now_ms: float) -> dict[str, Any] | None:
    """The epoch that has been open longest, and the sessions that it waits for."""
    # Prepared sessions wait for others.
    holding = [s for s in sessions if s.epoch_phase in (EpochPhase.PREPARING, EpochPhase.COMMITTING)]
    if not holding:
        return None
    epoch = min(holding, key=lambda session: session.barrier_ms).epoch
    held_up_by = [session for session in holding if session.epoch == epoch]
    return {
        "epoch": epoch,
        "age_ms": round(now_ms - min(session.barrier_ms for session in held_up_by)),
        "waiting_for": [f"slot {session.slot} ({session.epoch_phase.value})" for session in held_up_by],
    }


def _longest_record(sessions: list[Session], now_ms: float) -> dict[str, Any] | None:
    """The record that a handler has been processing for longest. None if no record takes long."""
    running = [record for session in sessions if (record := _running_record(session, now_ms)) is not None]
    return max(running, key=lambda record: record["running_ms"], default=None)


def _running_record(session: Session, now_ms: float) -> dict[str, Any] | None:
    record = session.stats.record if session.stats is not None else None
    if record is None:
        return None
    return {
        "topic": record.topic,
        "partition": record.partition,
        "offset": record.offset,
        "running_ms": round(record.running_ms + now_ms - session.stats_ms),
        "slot": session.slot,
    }


def _worker(session: Session, shards: int, now_ms: float) -> dict[str, Any]:
    stats = session.stats
    phase = "suspect" if session.suspect_until_ms is not None else session.phase.value
    if phase == "live" and session.leaving:
        phase = "leaving"
    if phase == "live":
        phase = "restoring" if stats is not None and stats.restoring else "running"
    return {
        "slot": session.slot,
        "worker": session.worker,
        "host": session.host,
        "pid": session.pid,
        "session": session.number,
        "phase": phase,
        "leaving": session.leaving,
        "leaving_said": session.leaving_said,
        "last_heard_ms": round(now_ms - session.heard_ms),
        "shards": shards,
        "epoch": session.epoch,
        "epoch_phase": session.epoch_phase.value,
        "interval_ms": session.interval_ms,
        "backlog": session.backlog,
        "epochs_committed": session.epochs_committed,
        "records_in": stats.records_in if stats else 0,
        "records_out": stats.records_out if stats else 0,
        "records_skipped": stats.records_skipped if stats else 0,
        "records_late": stats.records_late if stats else 0,
        "records_in_per_second": round(session.records_in_per_second, 1),
        "records_out_per_second": round(session.records_out_per_second, 1),
        "commit_latency_ms_p50": stats.commit_latency_ms_p50 if stats else -1,
        "commit_latency_ms_p99": stats.commit_latency_ms_p99 if stats else -1,
        "epoch_phases": {
            phase.name: {"ms_p50": round(phase.ms_p50, 3), "ms_p99": round(phase.ms_p99, 3)}
            for phase in (stats.epoch_phases if stats else ())
        },
        "resident_bytes": stats.resident_bytes if stats else -1,
        "snapshot_epoch_min": stats.snapshot_epoch_min if stats else -1,
        "standbys": len(session.standbys),
        "record": _running_record(session, now_ms),
        "calls_wait": stats.calls_wait if stats else "",
        "restore_bytes": stats.restore_bytes if stats else 0,
        "restore_bytes_left": stats.restore_bytes_left if stats else -1,
        "restore_ms_left": stats.restore_ms_left if stats else -1,
    }


def _shard(cluster: Cluster, progress: Progress, shard: Shard, topics: Sequence[str]) -> dict[str, Any]:
    """For a shard with several inputs, offsets are sums over these. The single inputs follow."""
    standing = progress.standing(shard.identity)
    stopped_by = shard.stopped_by if shard.phase is ShardPhase.STOPPED else None
    inputs = [_input(topic, progress.standing(shard.identity, number)) for number, topic in enumerate(topics)]
    return {
        "stage": shard.identity.stage,
        "partition": shard.identity.partition,
        "slot": -1 if shard.slot is None else shard.slot,
        "phase": "unassigned" if shard.slot is None else shard.phase.value,
        "stopped_reason": "" if stopped_by is None else str(stopped_by),
        "failure": None if stopped_by is None else stopped_by.document(),
        "position": _sum(inputs, "position"),
        "committed": _sum(inputs, "committed"),
        "end": _sum(inputs, "end"),
        "lag": _sum(inputs, "lag"),
        "inputs": inputs,
        "dirty": standing.dirty if standing else False,
        "epoch": standing.epoch if standing else -1,
        "moving_to": -1 if shard.target is None else shard.target,
        "standbys": [_standby(cluster, shard, slot) for slot in shard.standbys],
    }


def _input(topic: str, standing: ShardStatus | None) -> dict[str, Any]:
    """The position of a shard in one of its inputs."""
    position, end = (standing.position, standing.end) if standing else (-1, -1)
    return {
        "topic": topic,
        "position": position,
        "committed": standing.committed if standing else -1,
        "end": end,
        "lag": max(0, end - position) if end >= 0 and position >= 0 else -1,
    }


def _sum(inputs: Sequence[Mapping[str, Any]], name: str) -> int:
    """The sum over all inputs. -1 if one isn't known."""
    numbers = [int(one[name]) for one in inputs]
    return sum(numbers) if min(numbers) >= 0 else -1


def _standby(cluster: Cluster, shard: Shard, slot: int) -> dict[str, int]:
    """A warm copy: how far it has come, in state epochs and in offsets of the changelog."""
    session = cluster.slots[slot].session if slot in cluster.slots else None
    status = session.standbys.get(shard.identity) if session is not None else None
    return {
        "slot": slot,
        "state_epoch": status.state_epoch if status else -1,
        "lag": status.lag if status else -1,
    }
