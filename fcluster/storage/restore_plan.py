"""Decides what a shard's state is restored from.

Responsible for: choosing the base (local files, a snapshot, or nothing) from which the changelog leads to the
committed epoch, or saying why there is none. Invariant 1 (Kafka is the only source of truth): the target is
what Kafka committed; everything else is a cache, and is used only if it fits. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from fcluster.common.errors import StateDamaged
from fcluster.common.ids import ShardId
from fcluster.common.positions import CommittedPosition
from fcluster.engine.changelog import RESET_REMEDY
from fcluster.engine.state import StoreMeta
from fcluster.storage.manifest import Manifest, same_changelog


@dataclass(frozen=True, slots=True)
class RestoreRequest:
    """A shard to restore.

    Attributes:
        changelog: the topic of its deltas. The partition has the shard's number.
        committed: the committed position. None if the group has no offset for the shard.
        changelog_id: the topic's id, "" if unknown; `restore_shards` finds it out.
        further_topics: the topics of the shard's inputs after the first.
    """

    shard: ShardId
    changelog: str
    committed: CommittedPosition | None
    changelog_id: str = ""
    further_topics: tuple[str, ...] = ()

    @property
    def target_epoch(self) -> int:
        """The epoch at which the restore must end."""
        return 0 if self.committed is None else self.committed.state_epoch


class Base(Enum):
    """What a restore starts from."""

    LOCAL = "local files"
    SNAPSHOT = "snapshot"
    NOTHING = "nothing"


@dataclass(frozen=True, slots=True)
class RestorePlan:
    """How a shard gets to its committed epoch.

    Attributes:
        base: what to start from. Every base except LOCAL replaces the local files.
        snapshot: the snapshot, if the base is one.
        meta: the position of the base.
        read_to: the changelog is read from `meta.changelog_offset` up to this offset. It isn't read if the
            base is already there.
        reasons: why better bases were rejected.
    """

    base: Base
    snapshot: Manifest | None
    meta: StoreMeta
    read_to: int
    reasons: tuple[str, ...] = ()

    @property
    def offsets_to_read(self) -> int:
        """How many offsets of the changelog have to be read."""
        return max(0, self.read_to - self.meta.changelog_offset)


def stands_exactly(request: RestoreRequest, local: StoreMeta) -> bool:
    """Whether the local files have exactly the state that the shard needs, so that neither changelog nor
    snapshots matter.

    In at-least-once mode only the changelog shows that, because deltas are written before offsets.
    """
    return (
        request.committed is not None
        and local.state_epoch == request.target_epoch
        and same_changelog(local.changelog_id, request.changelog_id)
    )


def plan_restore(
    request: RestoreRequest,
    local: StoreMeta | None,
    snapshots: Sequence[Manifest],
    changelog_begin: int,
    changelog_end: int,
    *,
    exactly_once: bool = True,
) -> RestorePlan:
    """How to restore a shard.

    Local files take precedence if the changelog has everything after them, even if a snapshot is newer. The
    changelog is truncated up to the older snapshot, so a replay never exceeds two snapshot intervals.

    Args:
        request: the shard and what Kafka committed for it.
        local: the position of its local files. None if they can't be used.
        snapshots: newest first.
        changelog_begin: the first offset that its changelog partition still has.
        changelog_end: the offset after its last record.
        exactly_once: if False, state may be ahead of the committed epoch.

    Raises:
        StateDamaged: no base leads to the committed epoch.
    """
    if exactly_once and request.committed is None and changelog_begin > 0:
        raise uncommitted_state(request, f"records before offset {changelog_begin}")
    reasons: list[str] = []
    nothing = StoreMeta(0, changelog_begin, request.changelog_id)

    def usable(meta: StoreMeta, what: str) -> bool:
        problem = _why_unusable(request, meta, changelog_begin, changelog_end, exactly_once)
        if problem is not None:
            reasons.append(f"{what} {problem}")
        return problem is None

    def plan(base: Base, meta: StoreMeta, snapshot: Manifest | None = None) -> RestorePlan:
        there = exactly_once and request.committed is not None and meta.state_epoch == request.target_epoch
        read_to = meta.changelog_offset if there and base is not Base.NOTHING else changelog_end
        return RestorePlan(base, snapshot, meta, read_to, tuple(reasons))

    if local is None:
        reasons.append("the local files can't be read")
    elif local.state_epoch > 0 and usable(local, f"the local state at epoch {local.state_epoch}"):
        return plan(Base.LOCAL, local)
    for manifest in snapshots:
        if usable(manifest.meta, f"the snapshot at epoch {manifest.state_epoch}"):
            return plan(Base.SNAPSHOT, manifest.meta, manifest)
    if changelog_begin == 0:
        return plan(Base.NOTHING, nothing)
    reasons.append(f"the changelog begins only at offset {changelog_begin}")
    what = f"the state of {request.shard} at epoch {request.target_epoch}"
    raise StateDamaged(
        f"{what} can't be restored: {'; '.join(reasons)}",
        remedy="Make the snapshot store available again, or " + RESET_REMEDY[0].lower() + RESET_REMEDY[1:],
    )


def plan_standby(
    changelog_id: str,
    local: StoreMeta | None,
    snapshots: Sequence[Manifest],
    changelog_begin: int,
    changelog_end: int,
) -> RestorePlan | None:
    """What a warm copy of a shard starts from. From there the copy follows the changelog as long as it is
    wanted.

    There is no target epoch: a read_committed consumer gets only what is committed.

    Args:
        as for `plan_restore`.

    Returns:
        None if the changelog doesn't continue from anything that exists. A later snapshot will help.
    """

    def usable(meta: StoreMeta) -> bool:
        return (
            meta.state_epoch > 0
            and same_changelog(meta.changelog_id, changelog_id)
            and changelog_begin <= meta.changelog_offset <= changelog_end
        )

    if local is not None and usable(local):
        return RestorePlan(Base.LOCAL, None, local, changelog_end)
    for manifest in snapshots:
        if usable(manifest.meta):
            return RestorePlan(Base.SNAPSHOT, manifest, manifest.meta, changelog_end)
    if changelog_begin == 0:
        return RestorePlan(Base.NOTHING, None, StoreMeta(0, 0, changelog_id), changelog_end)
    return None


def uncommitted_state(request: RestoreRequest, found: str) -> StateDamaged:
    """The error for a changelog that has state of a shard without a committed offset."""
    return StateDamaged(
        f"the group has no committed offset for {request.shard}, but the changelog {request.changelog} has "
        f"state of it ({found}): the offset expired or was deleted",
        remedy="Let the job process its sources again: `fcluster reset JOB --to earliest` (with --dry-run it "
        "shows what would be deleted).",
    )


def _why_unusable(
    request: RestoreRequest, meta: StoreMeta, begin: int, end: int, exactly_once: bool
) -> str | None:
    if not same_changelog(meta.changelog_id, request.changelog_id):
        return "belongs to a changelog that was deleted since"
    if exactly_once and meta.state_epoch > request.target_epoch:
        return f"is ahead of the committed epoch {request.target_epoch}"
    if exactly_once and request.committed is not None and meta.state_epoch == request.target_epoch:
        return None  # no part of the changelog is needed
    if meta.changelog_offset < begin:
        return f"needs the changelog from offset {meta.changelog_offset}, which begins at {begin}"
    if meta.changelog_offset > end:
        return f"needs the changelog from offset {meta.changelog_offset}, which ends at {end}"
    return None
