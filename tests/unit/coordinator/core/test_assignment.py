"""The plan is balanced, sticky and deterministic for any cluster."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping

from hypothesis import given, settings
from hypothesis import strategies as st

from fcluster.common.ids import ShardId
from fcluster.coordinator.core.assignment import place_standbys, plan


def shards_of(**partitions: int) -> list[ShardId]:
    return [ShardId(stage, partition) for stage, count in partitions.items() for partition in range(count)]


def moves(current: Mapping[ShardId, int], target: Mapping[ShardId, int], slots: Collection[int]) -> int:
    return sum(1 for shard, slot in target.items() if current.get(shard) in slots and current[shard] != slot)


def spread(target: Mapping[ShardId, int], slots: Collection[int], stage: str | None = None) -> int:
    loads = Counter(dict.fromkeys(slots, 0))
    loads.update(slot for shard, slot in target.items() if stage in (None, shard.stage))
    return max(loads.values()) - min(loads.values())


@st.composite
def clusters(draw: st.DrawFn) -> tuple[list[ShardId], list[int], dict[ShardId, int]]:
    sizes = draw(st.lists(st.integers(0, 12), min_size=1, max_size=4))
    shards = shards_of(**{f"stage{number}": size for number, size in enumerate(sizes)})
    slots = draw(st.lists(st.integers(0, 9), min_size=1, max_size=7, unique=True))
    current = {
        shard: slot for shard in shards if (slot := draw(st.one_of(st.none(), st.integers(0, 9)))) is not None
    }
    return shards, slots, current


@given(clusters())
def test_all_shards_of_any_cluster_are_placed_evenly(
    cluster: tuple[list[ShardId], list[int], dict[ShardId, int]],
) -> None:
    shards, slots, current = cluster
    target = plan(shards, slots, current)
    assert sorted(target) == sorted(shards)
    assert set(target.values()) <= set(slots)
    assert spread(target, slots) <= 1
    for stage in {shard.stage for shard in shards}:
        assert spread(target, slots, stage) <= 1


@given(clusters())
def test_a_plan_carried_out_is_not_changed_again(
    cluster: tuple[list[ShardId], list[int], dict[ShardId, int]],
) -> None:
    shards, slots, current = cluster
    target = plan(shards, slots, current)
    assert plan(shards, slots, target) == target


@given(clusters(), st.randoms())
def test_order_of_the_arguments_does_not_matter(
    cluster: tuple[list[ShardId], list[int], dict[ShardId, int]], random: object
) -> None:
    shards, slots, current = cluster
    reordered = dict(reversed(list(current.items())))
    assert plan(shards[::-1], slots[::-1], reordered) == plan(shards, slots, current)


def balanced_targets(shards: list[ShardId], slots: list[int]) -> Iterator[dict[ShardId, int]]:
    for choice in itertools.product(slots, repeat=len(shards)):
        target = dict(zip(shards, choice, strict=True))
        stages = {shard.stage for shard in shards}
        if spread(target, slots) <= 1 and all(spread(target, slots, stage) <= 1 for stage in stages):
            yield target


@st.composite
def small_clusters(draw: st.DrawFn) -> tuple[list[ShardId], list[int], dict[ShardId, int]]:
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3).filter(lambda sizes: sum(sizes) <= 7))
    shards = shards_of(**{f"stage{number}": size for number, size in enumerate(sizes)})
    slots = list(range(draw(st.integers(1, 3))))
    return shards, slots, {shard: draw(st.integers(0, 3)) for shard in shards}


@settings(max_examples=60, deadline=None)
@given(small_clusters())
def test_no_other_balanced_plan_needs_fewer_moves(
    cluster: tuple[list[ShardId], list[int], dict[ShardId, int]],
) -> None:
    shards, slots, current = cluster
    fewest = min(moves(current, target, slots) for target in balanced_targets(shards, slots))
    assert moves(current, plan(shards, slots, current), slots) == fewest


def test_dead_slot_moves_only_its_own_shards() -> None:
    shards = shards_of(a=8)
    before = plan(shards, range(4), {})
    after = plan(shards, [0, 1, 3], before)
    assert {shard for shard in shards if before[shard] != after[shard]} == {
        shard for shard in shards if before[shard] == 2
    }


def test_slot_that_joins_takes_no_more_than_its_share() -> None:
    shards = shards_of(a=8)
    before = plan(shards, range(3), {})
    after = plan(shards, range(4), before)
    assert moves(before, after, range(4)) == 2
    assert Counter(after.values()) == {0: 2, 1: 2, 2: 2, 3: 2}


def test_new_cluster_assigns_partitions_in_turn() -> None:
    assert plan(shards_of(a=4), [7, 3], {}) == {
        ShardId("a", 0): 3,
        ShardId("a", 1): 7,
        ShardId("a", 2): 3,
        ShardId("a", 3): 7,
    }


def test_several_small_stages_do_not_pile_up_on_the_first_slot() -> None:
    shards = shards_of(a=1, b=1, c=1, d=1)
    assert Counter(plan(shards, range(4), {}).values()) == {0: 1, 1: 1, 2: 1, 3: 1}


def test_plan_without_slots_is_empty() -> None:
    assert plan(shards_of(a=3), [], {ShardId("a", 0): 1}) == {}


def test_thousand_workers_and_ten_thousand_shards_are_planned_in_seconds() -> None:
    shards = shards_of(**{f"stage{number}": 2_003 for number in range(5)})
    before = plan(shards, range(1_000), {})
    started = time.thread_time()  # CPU time, so other load on the machine doesn't matter
    after = plan(shards, [slot for slot in range(1_001) if slot != 500], before)
    assert time.thread_time() - started < 5
    assert moves(before, after, set(range(1_001)) - {500}) == 0


# --- standbys -----------------------------------------------------------------------------------------

Copies = dict[ShardId, tuple[int, ...]]
Standing = tuple[dict[ShardId, int | None], dict[int, str], int, Copies]


@st.composite
def standings(draw: st.DrawFn) -> Standing:
    """Owners, hosts of live slots, replicas, and existing copies, some of which are no longer possible."""
    shards = shards_of(a=draw(st.integers(0, 10)), b=draw(st.integers(0, 4)))
    slots = draw(st.lists(st.integers(0, 7), max_size=7, unique=True))
    hosts = {slot: draw(st.sampled_from(["h1", "h2", "h3"])) for slot in slots}
    owners = {shard: draw(st.one_of(st.none(), st.integers(0, 7))) for shard in shards}
    current = {shard: tuple(draw(st.lists(st.integers(0, 7), max_size=3))) for shard in shards}
    return owners, hosts, draw(st.integers(0, 3)), current


@given(standings())
def test_there_are_as_many_copies_as_possible_and_none_with_the_owner(standing: Standing) -> None:
    owners, hosts, replicas, _ = standing
    for shard, slots in place_standbys(*standing).items():
        candidates = set(hosts) - {owners[shard]}
        assert set(slots) <= candidates
        assert len(set(slots)) == len(slots) == min(replicas, len(candidates))


@given(standings())
def test_copy_is_on_another_host_if_there_is_one(standing: Standing) -> None:
    owners, hosts, _, _ = standing
    for shard, slots in place_standbys(*standing).items():
        home = hosts.get(-1 if (owner := owners[shard]) is None else owner)
        if slots and set(hosts.values()) - {home}:
            assert any(hosts[slot] != home for slot in slots)


@given(standings())
def test_no_copy_could_move_to_make_the_numbers_more_even(standing: Standing) -> None:
    owners, hosts, _, _ = standing
    placed = place_standbys(*standing)
    loads = Counter(dict.fromkeys(hosts, 0))
    loads.update(slot for slots in placed.values() for slot in slots)
    for shard, slots in placed.items():
        for slot in slots:
            used = {hosts[other] for other in {*slots, owners[shard]} - {slot} if other in hosts}
            for other in set(hosts) - {*slots, owners[shard]}:
                allowed = hosts[other] not in used or set(hosts.values()) <= used
                assert not (allowed and loads[other] + 2 <= loads[slot])


@given(standings())
def test_placed_copies_stay(standing: Standing) -> None:
    owners, hosts, replicas, _ = standing
    placed = place_standbys(*standing)
    assert place_standbys(owners, hosts, replicas, placed) == placed


@given(standings())
def test_order_of_slots_and_shards_does_not_matter_for_copies(standing: Standing) -> None:
    owners, hosts, replicas, current = standing
    turned = dict(reversed(list(owners.items()))), dict(reversed(list(hosts.items())))
    assert place_standbys(*turned, replicas, current) == place_standbys(*standing)


def test_copies_of_a_dead_slot_are_placed_again_and_the_others_stay() -> None:
    shards = shards_of(a=12)
    owners: dict[ShardId, int | None] = dict(plan(shards, range(4), {}))
    hosts = dict.fromkeys(range(4), "h")
    before = place_standbys(owners, hosts, 1, {})
    del hosts[3]
    for shard in [shard for shard in shards if owners[shard] == 3]:
        owners[shard] = before[shard][0]
    after = place_standbys(owners, hosts, 1, before)
    kept = [shard for shard in shards if before[shard][0] not in (3, owners[shard])]
    assert sum(after[shard] != before[shard] for shard in kept) <= 1


def test_copies_of_one_owner_are_spread_over_the_others() -> None:
    shards = shards_of(a=16)
    owners: dict[ShardId, int | None] = dict(plan(shards, range(5), {}))
    placed = place_standbys(owners, dict.fromkeys(range(5), "h"), 1, {})
    for slot in range(5):
        keepers = Counter(placed[shard][0] for shard in shards if owners[shard] == slot)
        assert len(keepers) >= 2


def test_thousand_workers_place_ten_thousand_copies_in_seconds() -> None:
    shards = shards_of(a=10_000)
    owners: dict[ShardId, int | None] = dict(plan(shards, range(1_000), {}))
    hosts = {slot: f"host-{slot % 50}" for slot in range(1_000)}
    started = time.thread_time()  # CPU time, so other load on the machine doesn't matter
    before = place_standbys(owners, hosts, 1, {})
    del hosts[500]
    place_standbys(owners, hosts, 1, before)
    assert time.thread_time() - started < 5
