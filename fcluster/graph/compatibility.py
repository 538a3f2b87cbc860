"""Whether state written under an older description of a job fits the job as it is now."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

from fcluster.graph.description import ALL_ROWS, FORMATS_READ, VERSION, further_inputs
from fcluster.graph.functions import comparable
from fcluster.graph.shapes import shape_difference
from fcluster.graph.states import DocumentState
from fcluster.graph.timestamps import FROM_KAFKA
from fcluster.graph.topology import Topology

_TIMED = ("windows", "timers", "joins")
"""The parts of a stage's description that something is kept for which waits for event time."""

_UNDO = "(Undo the change. Or run the job under another name, or start again: `fcluster reset`.)"


def incompatibility(old_description: Mapping[str, Any], new_topology: Topology) -> str | None:
    """Why state and offsets written under `old_description` don't fit `new_topology`.

    New stages and new stores are compatible: they begin empty. So is the removal of a stage that had no state
    and read a topic of the user. A stage may get more inputs, and lose inputs that are topics of the user.

    Args:
        old_description: what `Topology.describe` returned when they were written.

    Returns:
        One sentence that names what is incompatible, None if nothing is.
    """
    return next(incompatibilities(old_description, new_topology), None)


def incompatibilities(old_description: Mapping[str, Any], new_topology: Topology) -> Iterator[str]:
    """Like `incompatibility`, with the first reason of each stage for which there is one."""
    if old_description.get("format") not in FORMATS_READ:
        yield (
            "The state was written by another version of fcluster, in a format that this version can't read."
        )
        return
    if old_description.get("job") != new_topology.job:
        yield f"The state belongs to the job {old_description.get('job')!r}, not to {new_topology.job!r}."
        return
    old_stages = cast(Mapping[str, Mapping[str, Any]], old_description.get("stages", {}))
    new_stages = cast(dict[str, dict[str, Any]], new_topology.describe()["stages"])
    new_homes: dict[str, str] = {
        store: name for name, stage in new_stages.items() for store in stage["stores"]
    }
    keyed = _steps_with_keys(new_stages.values())
    old_stores = {store for stage in old_stages.values() for store in stage.get("stores", ())}
    depends_on_time = any(part in stage for stage in old_stages.values() for part in _TIMED)
    globals_now = _global_tables(new_stages.values())
    new_globals = [name for name in globals_now if name not in _global_tables(old_stages.values())]
    added: list[str] = [store for store in new_homes if store not in old_stores]
    for name, old in old_stages.items():
        reason = (
            _lost_copy(name, old, new_homes, globals_now, new_globals)
            or _lost_store(name, old, new_homes, added, globals_now)
            or _changed_states(old, new_stages.get(name, {}))
            or _lost_timer(old, new_stages.get(name, {}))
            or _changed_windows(old, new_stages.get(name, {}))
            or _changed_tables(old, new_stages.get(name, {}))
            or _changed_joins(old, new_stages.get(name, {}))
            or _changed_stage(name, old, new_stages, keyed)
            or _changed_inputs(name, old, new_stages, keyed)
            or (_changed_timestamps(old, new_stages.get(name, {})) if depends_on_time else None)
        )
        if reason:
            yield reason
    yield from _incomplete_copies(old_stages, new_stages)


def _incomplete_copies(
    old_stages: Mapping[str, Mapping[str, Any]], new_stages: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    """For each new copy of a global table whose topic was read before: why it would lack rows."""
    before = _inputs_of(old_stages)
    read = {str(source.get("source")) for source in before.values()}
    for stage, described in new_stages.items():
        for source in further_inputs(described):
            topic = source.get("key_by", {}).get("topic")
            if source["name"] not in before and topic in read:
                yield (
                    f"The global table of the topic {topic!r} is new in the stage {stage!r}, but the job has "
                    "read that topic already: the rows that came before would be missing there. (Copy the "
                    "topic with another job, and declare a global table over the copy. Or start again: "
                    "`fcluster reset`.)"
                )


def _global_tables(stages: Iterable[Mapping[str, Any]]) -> list[str]:
    """The global tables of which stages have copies."""
    tables = (table for stage in stages for table in stage.get("tables", {}).values())
    return list(dict.fromkeys(str(table["copy_of"]) for table in tables if "copy_of" in table))


def _lost_copy(
    stage: str,
    old: Mapping[str, Any],
    homes: Mapping[str, str],
    globals_now: Collection[str],
    new_globals: list[str],
) -> str | None:
    """The global table of which a stage has a copy that it no longer has."""
    for store, described in cast("Mapping[str, Mapping[str, Any]]", old.get("tables", {})).items():
        table = described.get("copy_of")
        if table is None or store in homes:
            continue
        start = (
            f"The global table {table!r} was joined in the stage {stage!r}, which has a copy of its rows, and"
        )
        if table in globals_now:
            return f"{start} is no longer joined there. {_UNDO}"
        near = _nearest(str(table), new_globals)
        hint = f" (renamed to {near!r}?)" if near else ""
        return f"{start} is no longer in the job{hint}. {_UNDO}"
    return None


def _inputs_of(stages: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The description of each input, by its name."""
    return {
        str(source["name"]): source
        for name, stage in stages.items()
        for source in ({**stage, "name": name}, *further_inputs(stage))
    }


def _lost_store(
    stage: str,
    old: Mapping[str, Any],
    homes: Mapping[str, str],
    added: list[str],
    globals_now: Collection[str],
) -> str | None:
    for store in old.get("stores", ()):
        kind = "table" if store in old.get("tables", ()) else "handler"
        kind = "grouping" if store in old.get("groupings", ()) else kind
        kind = "join" if store in old.get("foreign", ()) else kind
        if store not in homes and kind == "table" and store in globals_now:
            return (
                f"The table {store!r} of stage {stage!r} has state, and is now a global table, whose rows "
                "are kept elsewhere. (Run the job under another name, or start again: `fcluster reset`.)"
            )
        if store not in homes:
            near = _nearest(store, added)
            hint = f" (renamed to {near!r}?)" if near else ""
            return f"The {kind} {store!r} of stage {stage!r} has state, but is no longer in the job{hint}."
        if homes[store] != stage:
            return f"The {kind} {store!r} has state in stage {stage!r}, but is now in {homes[store]!r}."
    return None


def _changed_states(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """Why a declared state of a stage is incompatible with its present declaration."""
    declared = cast("Mapping[str, Mapping[str, Any]]", new.get("states", {}))
    former = dict(cast("Mapping[str, Mapping[str, Any]]", old.get("states", {})))
    for name, state in declared.items():
        if state["kind"] == DocumentState.kind and name.partition("/")[0] in old.get("stores", ()):
            former.setdefault(name, {"kind": DocumentState.kind, "value": "json"})
    for name, before in former.items():
        now = declared.get(name)
        handler, _, state = name.partition("/")
        what = f"The state {state!r} of the handler {handler!r}"
        if now is None:
            near = _nearest(name, [other for other in declared if other not in former])
            hint = f" (renamed to {near.partition('/')[2]!r}?)" if near else ""
            return f"{what} has entries, but is no longer declared{hint}."
        models = [cast("Mapping[str, Any]", stage.get("models", {})).get(name) for stage in (old, new)]
        reason = _changed_state(what, before, now, *models)
        if reason:
            return reason
    return None


def _changed_state(
    what: str, before: Mapping[str, Any], now: Mapping[str, Any], old_model: Any, new_model: Any
) -> str | None:
    was, is_now = _version_of_state(before), _version_of_state(now)
    others = [part for part in ("kind", "key", "ttl") if before.get(part) != now.get(part)]
    is_changed = before["value"] != now["value"] and was == is_now
    if others or is_changed:
        hint = "" if others else f"{_migrate_hint(was, before['value'])}; or "
        return (
            f"{what} was declared as {_state_text(before)}, and is now declared as {_state_text(now)}: "
            f"its entries can't be read that way. (To change it, {hint}keep the old declaration, declare "
            "another state under a new name, and let the handler copy each key's entries when a "
            "record of that key comes.)"
        )
    if was > is_now:
        return (
            f"{what} has entries of version {was}, and is now declared with version={is_now}. (Start the job "
            "file that knows that version.)"
        )
    if was == is_now and None not in (old_model, new_model):
        difference = shape_difference(old_model, new_model)
        if difference is not None:
            return (
                f"{what} has a model that has changed: {difference}. (Undo the change; or "
                f"{_migrate_hint(was, before['value'])}, which gets each former value as JSON holds it.)"
            )
    known = _kinds_by_version(now)
    for version, kind in _kinds_by_version(before).items():
        if version not in known:
            return (
                f"{what} may have entries of version {version}, and migrate= has no function for them. (Keep "
                "the functions of all former versions: entries are migrated when a record meets them.)"
            )
        if known[version] != kind:
            return (
                f"{what} has entries of version {version} that are {kind} values, and is now declared as if "
                f"they were {known[version]} values. (Say what they were: migrate={{{version}: "
                f"({kind!r}, function)}}.)"
            )
    return None


def _version_of_state(described: Mapping[str, Any]) -> int:
    return int(described.get("version", 1))


def _kinds_by_version(described: Mapping[str, Any]) -> dict[str, str]:
    """The kind of values of each version of which there may be entries."""
    kinds = {**cast("Mapping[str, str]", described.get("former", {}))}
    kinds[str(_version_of_state(described))] = str(described["value"])
    return kinds


def _migrate_hint(version: int, kind: str) -> str:
    return f"declare it with version={version + 1} and migrate={{{version}: ({kind!r}, function)}}"


def _lost_timer(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """The timer of a stage that may be set, but no longer has a function."""
    declared = cast("Mapping[str, Sequence[str]]", new.get("timers", {}))
    for handler, before in cast("Mapping[str, Sequence[str]]", old.get("timers", {})).items():
        now = declared.get(handler, ())
        for name in before:
            if name not in now:
                near = _nearest(name, [other for other in now if other not in before])
                hint = f" (renamed to {near!r}?)" if near else ""
                return (
                    f"The timer {name!r} of the handler {handler!r} may be set, but no longer has an "
                    f"on_timer function{hint}."
                )
    return None


def _changed_windows(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """Why the open windows of a stage don't fit what they are declared as now."""
    declared = cast("Mapping[str, Mapping[str, Any]]", new.get("windows", {}))
    former = cast("Mapping[str, Mapping[str, Any]]", old.get("windows", {}))
    for name in (*former, *(name for name in declared if name in old.get("stores", ()))):
        before, now = former.get(name), declared.get(name)
        if before is None or now is None:
            was, is_now = ("a handler", "a window") if before is None else ("a window", "a handler")
            return f"The step {name!r} has state as {was}, and is now {is_now}."
        for part, what in (
            ("windows", "are"),
            ("aggregates", "compute"),
            ("value", "keep"),
            ("emits", "emit"),
            ("closes", "close"),
        ):
            if before.get(part) != now.get(part):
                texts = [_windows_text(described.get(part)) for described in (before, now)]
                return (
                    f"The windows of {name!r} used to {what.replace('are', 'be')} {texts[0]}, and now {what} "
                    f"{texts[1]}: those that are open don't fit. (Keep them, and declare the new ones beside "
                    "them under another name.)"
                )
    return None


def _changed_tables(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """Why the rows of a stage's tables don't fit what they are declared as now."""
    declared = cast("Mapping[str, Mapping[str, Any]]", new.get("tables", {}))
    former = cast("Mapping[str, Mapping[str, Any]]", old.get("tables", {}))
    for name in (*former, *(name for name in declared if name in old.get("stores", ()))):
        before, now = former.get(name), declared.get(name)
        if before is None or now is None:
            was, is_now = ("a handler", "a table") if before is None else ("a table", "a handler")
            return f"The step {name!r} has state as {was}, and is now {is_now}."
        if before.get("sources") != now["sources"]:
            return (
                f"The table {name!r} used to be filled from {_listed(before.get('sources', ()))}, and is now "
                f"filled from {_listed(now['sources'])}: the rows that it has are of the former topic. "
                "(Declare a table of another name.)"
            )
        if before.get("computes") != now.get("computes"):
            texts = [_computes_text(described.get("computes")) for described in (before, now)]
            return (
                f"The table {name!r} used to have {texts[0]}, and now has {texts[1]}: what it has computed "
                "doesn't fit. (Keep it, and declare the new one beside it under another name.)"
            )
        title = f"The global table {now['copy_of']!r}" if "copy_of" in now else f"The table {name!r}"
        if before.get("history") and not now.get("history"):
            return (
                f"{title} had a history, and now has none: its former rows would stay for ever. "
                "(Keep history=, with a shorter time.)"
            )
        if before.get("ttl") != now.get("ttl"):
            had, has = ("no ttl=", "one") if now.get("ttl") else ("a ttl=", "none")
            return (
                f"{title} had {had}, and now has {has}: its rows are kept in another form. (Keep it as it "
                "was, and declare another table beside it.)"
            )
        if any(before.get(part) != now.get(part) for part in ("key", "value")):
            kinds = [_kinds_text(described) for described in (before, now)]
            way_out = "(Declare a table of another name, over another topic declaration.)"
            return (
                f"{title} has {kinds[0]}, and is now declared with {kinds[1]}: its rows can't be "
                f"read that way. {_UNDO if 'copy_of' in now else way_out}"
            )
    return None


def _changed_joins(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """Why the records that a stage's joins keep don't fit what they are declared as now."""
    declared = cast("Mapping[str, Mapping[str, Any]]", new.get("joins", {}))
    former = cast("Mapping[str, Mapping[str, Any]]", old.get("joins", {}))
    for name in (*former, *(name for name in declared if name in old.get("stores", ()))):
        before, now = former.get(name), declared.get(name)
        if before is None or now is None:
            was, is_now = ("a handler", "a join") if before is None else ("a join", "a handler")
            return f"The step {name!r} has state as {was}, and is now {is_now}."
        if before != now:
            return (
                f"The join {name!r} was declared as {_join_text(before)}, and is now declared as "
                f"{_join_text(now)}: the records that it keeps don't fit. (Keep it, and declare the new one "
                "beside it under another name.)"
            )
    return None


def _join_text(described: Mapping[str, Any]) -> str:
    return (
        f"{described.get('how')} (before_ms={described.get('before_ms')}, "
        f"after_ms={described.get('after_ms')}, {described.get('left')} with {described.get('right')} values)"
    )


def _kinds_text(described: Mapping[str, Any]) -> str:
    keys = f"{described.get('key')} keys"
    return f"{keys} and {described['value']} values" if "value" in described else keys


def _computes_text(described: Any) -> str:
    return "values of a topic or stream" if described is None else _windows_text(described)


def _listed(names: Sequence[str]) -> str:
    return " and ".join(map(repr, names))


def _windows_text(described: Any) -> str:
    if described is None:
        return "in another way"
    if isinstance(described, str):
        return described
    if isinstance(described, list):
        pairs = cast("list[list[str]]", described)
        return ", ".join(f"{name}={aggregate}" for name, aggregate in pairs)
    parts = cast("Mapping[str, Any]", described)
    rest = ", ".join(f"{name}={value}" for name, value in parts.items() if name != "kind")
    return f"{parts.get('kind')} ({rest})"


def _state_text(described: Mapping[str, Any]) -> str:
    key = described.get("key")
    parts = [str(described.get("kind"))]
    if key is not None:
        parts.append(f"with {', '.join(key) if isinstance(key, list) else key} keys")  # pyright: ignore[reportUnknownArgumentType]
    parts.append(f"of {described.get('value')} values")
    parts.append("with a TTL" if described.get("ttl") else "without a TTL")
    return " ".join(parts)


def _nearest(store: str, added: list[str]) -> str | None:
    near: list[str] = difflib.get_close_matches(store, added, 1, 0.5)
    if len(added) == 1:
        return added[0]
    return near[0] if near else None


def _changed_stage(
    name: str, old: Mapping[str, Any], stages: Mapping[str, Mapping[str, Any]], keyed: Mapping[str, _Keyed]
) -> str | None:
    old_key_by = cast(Mapping[str, str] | None, old.get("key_by"))
    new = stages.get(name)
    if new is None:
        if old_key_by is None:
            return None
        return (
            f"The stage {name!r} after key_by is gone, but its repartition topic may still have "
            "unprocessed records."
        )
    if old_key_by is None and new.get("key_by") is None and new["source"] != old.get("source"):
        return f"The stage {name!r} used to read {old.get('source')!r}, but now reads {new['source']!r}."
    new_key_by = new.get("key_by")
    if old_key_by is None or new_key_by is None:
        return (
            None
            if old_key_by == new_key_by
            else f"The stage {name!r} used to get its records in another way."
        )
    topics = [key_by.get("topic") for key_by in (old_key_by, new_key_by)]
    if None not in topics and topics[0] != topics[1]:
        return (
            f"The global table {new_key_by['by'].removeprefix(f'{ALL_ROWS} ')!r} used to be filled from "
            f"{topics[0]!r}, and is now filled from {topics[1]!r}: the rows that it has are of the former "
            f"topic. {_UNDO}"
        )
    if new_key_by.get("from") != old_key_by.get("from"):
        return (
            f"The stage {name!r} used to get its records from the stage {old_key_by.get('from')!r}, and "
            f"now gets them from {new_key_by['from']!r}."
        )
    reason = _changed_key(_keyed_by(name, keyed), old_key_by, new_key_by)
    if reason:
        return reason
    if new["encoding"] != old.get("encoding"):
        return (
            f"The key_by before {name!r} used to write keys and values as "
            f"{_encoding(old.get('encoding'))}, and now writes {_encoding(new['encoding'])}."
        )
    return None


def _changed_inputs(
    name: str, old: Mapping[str, Any], stages: Mapping[str, Mapping[str, Any]], keyed: Mapping[str, _Keyed]
) -> str | None:
    homes = {
        str(source["source"]): home
        for home, stage in stages.items()
        for source in (stage, *further_inputs(stage))
        if source.get("key_by") is None
    }
    further = {str(source["name"]): source for source in further_inputs(stages.get(name, {}))}
    for source in (old, *further_inputs(old)):
        topic = str(source.get("source"))
        if source.get("key_by") is None and homes.get(topic, name) != name:
            # Their offsets are committed with the epochs of the stage's state.
            return f"The topic {topic!r} was read in the stage {name!r}, but is now read in {homes[topic]!r}."
        if source is not old and source.get("key_by") is not None:
            reason = _changed_stage(str(source["name"]), source, further, keyed)
            if reason:
                return reason
    return None


def _changed_timestamps(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """Why what a stage keeps for some time doesn't fit the times of its records now."""
    now = {one["source"]: one for one in (new, *further_inputs(new)) if "source" in one}
    for before in (old, *further_inputs(old)):
        topic = before.get("source")
        if topic not in now:
            continue
        was, is_now = (str(one.get("timestamp", FROM_KAFKA)) for one in (before, now[topic]))
        if was != is_now:
            return (
                f"The timestamps of the topic {topic!r} used to come {was}, and now come {is_now}: event "
                "time, and what waits for it, are of the former ones."
            )
    return None


class _Keyed(NamedTuple):
    """What gives the keys of a stage.

    Attributes:
        title: how messages name it, as the beginning of a sentence.
        call: the call in the job file.
    """

    title: str
    call: str


def _keyed_by(name: str, keyed: Mapping[str, _Keyed]) -> _Keyed:
    return keyed.get(name) or _Keyed(f"The key_by before {name!r}", "key_by")


def _steps_with_keys(stages: Iterable[Mapping[str, Any]]) -> dict[str, _Keyed]:
    """What gives the keys of a stage if it isn't a `key_by` of the job file, by the name of the stage."""
    found: dict[str, _Keyed] = {}
    for stage in stages:
        for step in stage.get("foreign", ()):
            join = str(step).removesuffix("-links")
            found[f"{join}-subscriptions"] = _Keyed(f"on= of the join {join!r}", "join")
        for step in stage.get("groupings", ()):
            groups = str(step).removesuffix("-members")
            found[groups] = _Keyed(f"The group_by of {groups!r}", "group_by")
    return found


def _changed_key(keyed: _Keyed, old: Mapping[str, str], new: Mapping[str, str]) -> str | None:
    if _keys_compared(old, new) == "same":
        return None
    vouched = any(_vouched(key_by) for key_by in (old, new))
    if old.get("by") != new.get("by") and not vouched:
        return (
            f"{keyed.title} used the {old.get('by')}, and now uses the {new['by']}, but the state is keyed "
            "by the old one."
        )
    if _keys_compared(old, new) == "unknown":
        return None
    if vouched:
        return (
            f"{keyed.title} says version={_version(new)}, but said version={_version(old)} when the state "
            "was written."
        )
    return (
        f"{keyed.title} uses another {new['by']} than the one that the state is keyed by. (If both return "
        f"the same key for every value, say so with {keyed.call}(..., version=1): from then on the version "
        "is compared instead of the function.)"
    )


def _keys_compared(old: Mapping[str, str], new: Mapping[str, str]) -> Literal["same", "other", "unknown"]:
    """Whether two `key_by` return the same keys, as far as their descriptions show."""
    before, now = old.get("identity"), new.get("identity")
    if before is None or now is None:  # written by a version without identities
        return "unknown"
    if before == now:
        return "same"
    if _vouched(old) != _vouched(new) or not comparable(before, now):
        return "unknown"
    return "other"


def _vouched(key_by: Mapping[str, str]) -> bool:
    return key_by.get("identity", "").startswith(f"{VERSION} ")


def _version(key_by: Mapping[str, str]) -> str:
    return key_by.get("identity", "").removeprefix(f"{VERSION} ")


def unverified_keys(old_description: Mapping[str, Any], new_topology: Topology) -> list[str]:
    """One sentence for each `key_by` for which it is unknown whether it still returns the same keys."""
    remarks: list[str] = []
    former, description = _described_key_bys(old_description), new_topology.describe()
    keyed = _steps_with_keys(cast("Mapping[str, Mapping[str, Any]]", description["stages"]).values())
    for name, new in _described_key_bys(description).items():
        old = former.get(name)
        if old is not None and _keys_compared(old, new) == "unknown":
            remarks.append(
                f"{_keyed_by(name, keyed).title} ({new['by']}) is assumed to return the same keys as when "
                "the state was written: the function recorded then can't be compared with it. From now on "
                "it can."
            )
    return remarks


def _described_key_bys(description: Mapping[str, Any]) -> dict[str, Mapping[str, str]]:
    """The description of each `key_by`, by its name."""
    found: dict[str, Mapping[str, str]] = {}
    stages = cast("Mapping[str, Mapping[str, Any]]", description.get("stages", {}))
    for name, source in _inputs_of(stages).items():
        if source.get("key_by") is not None:
            found[name] = cast("Mapping[str, str]", source["key_by"])
    return found


def _encoding(encoding: Mapping[str, str] | None) -> str:
    return f"{encoding.get('key')} and {encoding.get('value')}" if encoding else "something else"
