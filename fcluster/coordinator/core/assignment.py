"""Which slot runs which shard, and which slots keep a warm copy of it.

Responsible for: `plan`, a pure function from the shards, the available slots and the current assignment to a
target assignment. Invariants:

- balanced: the slots' numbers of shards differ by at most one, in total and within each stage (shards of one
  stage may cost far more than those of another);
- sticky: the target is a balanced one with the fewest moves;
- deterministic: equal arguments give equal targets, in whatever order they are.

`place_standbys` does the same for warm copies: never on the owner, on another host if there is one, evenly,
with as few moves as that allows, deterministically.

Must not: know workers, sessions or time.

How `plan` works: within a stage, each slot gets the quotient of shards and slots, or one more. So the
question is which slots get *one more* in which stage, such that the totals are even too, and as many as
possible of these extra shards go to slots that already have them. That is a minimum-cost flow from stages to
slots. Slots that could keep extra shards in the same stages are interchangeable. So the flow runs over
classes of such slots, of which there are few, and is then distributed within each class.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from fcluster.common.ids import ShardId

_MOVE_AVOIDED = -1
_TOTALS_EVEN = -1_000_000
"""Outweighs all moves, because even totals are a requirement, not a preference."""


def plan(
    shards: Collection[ShardId], slots: Collection[int], current: Mapping[ShardId, int]
) -> dict[ShardId, int]:
    """The slot that each shard should be on.

    Args:
        shards: all shards, without duplicates.
        slots: the slots that can run shards. If there are none, the result is empty.
        current: where shards are now. Unknown shards, and slots that aren't in `slots`, don't count.
    """
    if not slots:
        return {}
    slots = sorted(slots)
    held = _held_shards(shards, slots, current)
    quotas = _quotas(held, slots)
    target: dict[ShardId, int] = {}
    for stage, (of_slot, without) in sorted(held.items()):
        homeless = list(without)
        room: dict[int, int] = {}
        for slot in slots:
            mine = sorted(of_slot.get(slot, ()))
            quota = quotas[stage, slot]
            target.update(dict.fromkeys(mine[:quota], slot))
            homeless.extend(mine[quota:])
            room[slot] = quota - len(mine[:quota])
        target.update(_deal_out(sorted(homeless), room))
    return target


_Held = dict[str, tuple[dict[int, list[ShardId]], list[ShardId]]]


def _held_shards(shards: Collection[ShardId], slots: list[int], current: Mapping[ShardId, int]) -> _Held:
    """For each stage: the shards of each slot, and the shards without one."""
    known = set(slots)
    held: _Held = defaultdict(lambda: (defaultdict(list), []))
    for shard in shards:
        of_slot, without = held[shard.stage]
        slot = current.get(shard)
        if slot in known:
            of_slot[slot].append(shard)
        else:
            without.append(shard)
    return held


def _deal_out(shards: list[ShardId], room: dict[int, int]) -> dict[ShardId, int]:
    """Give one shard to each slot with room in turn, so that shards with adjacent numbers end up on
    different slots.
    """
    dealt: dict[ShardId, int] = {}
    rest = iter(shards)
    while len(dealt) < len(shards):
        for slot, free in room.items():
            if free > 0:
                room[slot] -= 1
                shard = next(rest)
                dealt[shard] = slot
    return dealt


def _quotas(held: _Held, slots: list[int]) -> dict[tuple[str, int], int]:
    """How many shards of each stage each slot gets."""
    quotas: dict[tuple[str, int], int] = {}
    extras: dict[str, int] = {}
    keepers: dict[str, set[int]] = {}
    for stage, (of_slot, without) in sorted(held.items()):
        number = len(without) + sum(map(len, of_slot.values()))
        share, extras[stage] = divmod(number, len(slots))
        quotas.update({(stage, slot): share for slot in slots})
        keepers[stage] = {slot for slot, mine in of_slot.items() if len(mine) > share}
    for stage, winners in _deal_extras(extras, keepers, slots).items():
        for slot in winners:
            quotas[stage, slot] += 1
    return quotas


def _deal_extras(
    extras: dict[str, int], keepers: dict[str, set[int]], slots: list[int]
) -> dict[str, list[int]]:
    """For each stage, the slots that get one shard more than the others."""
    classes: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for slot in slots:
        classes[tuple(stage for stage in extras if slot in keepers[stage])].append(slot)
    least, odd = divmod(sum(extras.values()), len(slots))
    flow = _Flow()
    for stage, number in extras.items():
        flow.add("source", ("stage", stage), number, 0)
    for signature, members in classes.items():
        for stage in extras:
            cost = _MOVE_AVOIDED if stage in signature else 0
            flow.add(("stage", stage), ("class", signature), len(members), cost)
        flow.add(("class", signature), "sink", least * len(members), _TOTALS_EVEN)
        flow.add(("class", signature), "sink", len(members) if odd else 0, 0)
    flow.run("source", "sink")
    winners: dict[str, list[int]] = {stage: [] for stage in extras}
    for signature, members in classes.items():
        turn = 0
        for stage in extras:
            for _ in range(flow.through(("stage", stage), ("class", signature))):
                winners[stage].append(members[turn % len(members)])
                turn += 1
    return winners


@dataclass
class _Edge:
    """One direction of an edge. The opposite direction has the index `index ^ 1`."""

    target: object
    room: int
    cost: int


class _Flow:
    """A maximum flow of minimum cost, by successive cheapest paths (Bellman-Ford, because costs are
    negative).
    """

    def __init__(self) -> None:
        self._edges: list[_Edge] = []
        self._from: dict[object, list[int]] = defaultdict(list)

    def add(self, source: object, target: object, capacity: int, cost: int) -> None:
        self._from[source].append(len(self._edges))
        self._edges.append(_Edge(target, capacity, cost))
        self._from[target].append(len(self._edges))
        self._edges.append(_Edge(source, 0, -cost))

    def through(self, source: object, target: object) -> int:
        """The flow along the edges from `source` to `target`."""
        return sum(
            self._edges[index ^ 1].room
            for index in self._from[source]
            if index % 2 == 0 and self._edges[index].target == target
        )

    def run(self, source: object, sink: object) -> None:
        while path := self._cheapest_path(source, sink):
            amount = min(self._edges[index].room for index in path)
            for index in path:
                self._edges[index].room -= amount
                self._edges[index ^ 1].room += amount

    def _cheapest_path(self, source: object, sink: object) -> list[int]:
        cost: dict[object, int] = {source: 0}
        arrived_by: dict[object, int] = {}
        changed = [source]
        while changed:
            improved: dict[object, None] = {}  # used as an ordered set
            for node in changed:
                for index in self._from[node]:
                    edge = self._edges[index]
                    total = cost[node] + edge.cost
                    if edge.room > 0 and (edge.target not in cost or total < cost[edge.target]):
                        cost[edge.target] = total
                        arrived_by[edge.target] = index
                        improved[edge.target] = None
            changed = list(improved)
        path: list[int] = []
        node = sink
        while node in arrived_by:
            path.append(arrived_by[node])
            node = self._edges[arrived_by[node] ^ 1].target
        return path


# --- standbys -----------------------------------------------------------------------------------------


def place_standbys(
    owners: Mapping[ShardId, int | None],
    hosts: Mapping[int, str],
    replicas: int,
    current: Mapping[ShardId, Sequence[int]],
) -> dict[ShardId, tuple[int, ...]]:
    """The slots that keep a warm copy of each shard: `replicas` of them, or as many as there are.

    Existing copies stay where that is allowed. Missing copies go to the slots with the fewest. Then copies
    move from slots that have at least two more copies than another one, until no such move is left.

    Args:
        owners: the slot of each shard that should have standbys. None: it has no owner at present.
        hosts: the host of each slot that can keep copies.
        replicas: the number of copies wanted for each shard.
        current: where copies are now. Slots that aren't in `hosts` don't count.
    """
    # Place the shards of one owner one after another, so that their copies go to different slots. If the
    # owner dies, many slots then share its work.
    shards = sorted(owners, key=lambda shard: (-1 if (owner := owners[shard]) is None else owner, shard))
    loads = _Loads(hosts)
    placed: dict[ShardId, list[int]] = {}
    for shard in shards:
        kept: list[int] = []
        placed[shard] = kept
        candidates = [slot for slot in dict.fromkeys(current.get(shard, ())) if slot in hosts]
        for _ in range(2):  # those on hosts of their own come first
            for slot in candidates:
                if len(kept) < replicas and loads.may_keep(slot, owners[shard], kept):
                    kept.append(slot)
                    loads.add(slot, 1)
    for shard in shards:
        while len(placed[shard]) < replicas:
            slot = loads.lightest(owners[shard], placed[shard])
            if slot is None:
                break
            placed[shard].append(slot)
            loads.add(slot, 1)
    while _even_out(shards, owners, placed, loads):
        pass
    return {shard: tuple(sorted(slots)) for shard, slots in placed.items()}


def _even_out(
    shards: Iterable[ShardId],
    owners: Mapping[ShardId, int | None],
    placed: Mapping[ShardId, list[int]],
    loads: _Loads,
) -> bool:
    """Move copies to slots that keep at least two copies fewer. Returns whether any copy moved."""
    moved = False
    for shard in shards:
        for index, slot in enumerate(placed[shard]):
            if loads.of(slot) < loads.least + 2:
                continue
            others = placed[shard][:index] + placed[shard][index + 1 :]
            better = loads.lightest(owners[shard], others)
            if better is not None and loads.of(better) + 2 <= loads.of(slot):
                placed[shard][index] = better
                loads.add(slot, -1)
                loads.add(better, 1)
                moved = True
    return moved


class _Loads:
    """How many copies each slot keeps, sorted."""

    def __init__(self, hosts: Mapping[int, str]) -> None:
        self._hosts = hosts
        self._all_hosts = set(hosts.values())
        self._of = dict.fromkeys(hosts, 0)
        self._order = sorted((0, slot) for slot in hosts)

    @property
    def least(self) -> int:
        """The number of copies on the slot with the fewest."""
        return self._order[0][0]

    def of(self, slot: int) -> int:
        """The number of copies on `slot`."""
        return self._of[slot]

    def add(self, slot: int, number: int) -> None:
        """Add this many copies to `slot`."""
        load = self._of[slot]
        del self._order[bisect_left(self._order, (load, slot))]
        self._of[slot] = load + number
        insort(self._order, (load + number, slot))

    def may_keep(self, slot: int, owner: int | None, others: Sequence[int]) -> bool:
        """Whether `slot` can keep a copy in addition to the owner's state and the other copies."""
        if slot == owner or slot in others:
            return False
        used = self._hosts_of(owner, others)
        return self._hosts[slot] not in used or self._all_hosts <= used

    def lightest(self, owner: int | None, others: Sequence[int]) -> int | None:
        """The slot with the fewest copies that can keep another one. None if there is none."""
        used = self._hosts_of(owner, others)
        anywhere = self._all_hosts <= used
        for _, slot in self._order:
            if slot != owner and slot not in others and (anywhere or self._hosts[slot] not in used):
                return slot
        return None

    def _hosts_of(self, owner: int | None, others: Sequence[int]) -> set[str]:
        used = {self._hosts[slot] for slot in others}
        if owner is not None and owner in self._hosts:
            used.add(self._hosts[owner])
        return used
