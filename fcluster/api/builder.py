"""Compiles the graph that a job file draws into the stages of a topology."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, cast

from fcluster.api.checks import check_field_of
from fcluster.api.nodes import (
    KeyBy,
    Merge,
    Node,
    Seed,
    Sink,
    Source,
    opens_input,
    seeds,
    step_name,
)
from fcluster.common.errors import JobError
from fcluster.common.ids import changelog_topic, repartition_topic
from fcluster.graph.codecs import codec_name, kind_title
from fcluster.graph.description import rekey_description
from fcluster.graph.operators import (
    Branch,
    Broadcast,
    Filter,
    JoinStreams,
    JoinTable,
    KeepTable,
    KeptTable,
    MapAsync,
    OnError,
    Operator,
    Peek,
    Process,
    StatefulOperator,
    Subscribe,
    TellChanges,
    TopicSpec,
    ValueKind,
    Window,
    kept_in,
    names_of_table,
    replaced_table,
    tables_read_by,
)
from fcluster.graph.stages import Chain, Input, Stage, written_topics


class Builder:
    """Turns the graph of streams into stages.

    `lay_out` comes first. A user's topic is an input; so is the topic after a `key_by`. A merge or a join
    puts several inputs into one stage. Then each path through the graph becomes a chain.
    """

    def __init__(
        self,
        job: str,
        topics: Mapping[str, TopicSpec],
        topic_rules: Mapping[str, OnError | None],
        default_rule: OnError | None,
    ) -> None:
        self._job = job
        self._topic_rules = topic_rules
        self._default_rule = default_rule
        self._topics = topics
        self._input_names: dict[Seed, str] = {}
        self._stage_of: dict[str, list[str]] = {}
        """For each input: the inputs of its stage, in one shared list. A stage has the name of its first
        input.
        """
        self._inputs: dict[str, tuple[TopicSpec, bool]] = {}
        self._chains: dict[str, list[Chain]] = {}
        """The input of each name."""
        self._process_names: dict[str, Node] = {}
        self._joined_tables: set[str] = set()
        self._followed: set[tuple[str, str]] = set()
        """The tables and inputs for which the steps that follow the table's changes have their chains."""
        self._copies: dict[str, list[Node]] = {}
        """For each global table: a seed for each stage that has a copy of it."""
        self._copy_names: dict[str, str] = {}
        """The global table of each copy, by the copy's name."""

    # --- laying out -----------------------------------------------------------------------------------

    def lay_out(
        self,
        roots: Sequence[Node],
        merges: Sequence[Node],
        joins: Sequence[Node],
        global_joins: Sequence[Node],
    ) -> None:
        """Name the inputs and decide which of them belong to one stage."""
        self._joined_tables = {
            kept.name
            for join in joins
            if isinstance(join.step, JoinTable)
            for kept in kept_in(join.step.table)
        }
        for root in roots:
            name = cast(Source, root.step).topic.name
            self._input_names[name] = name
        groups: dict[Seed, list[Seed]] = {}
        for merge in merges:
            merged = list(dict.fromkeys(seeds(merge)))
            united = list(dict.fromkeys(one for seed in merged for one in groups.get(seed, [seed])))
            groups |= dict.fromkeys(united, united)
        for join in joins:
            # Inputs that are in one stage already come first: a further join doesn't rename it.
            places = {seed: place for place, seed in enumerate(groups)}
            joined = sorted(dict.fromkeys(seeds(join)), key=lambda seed: places.get(seed, len(places)))
            united = list(dict.fromkeys(one for seed in joined for one in groups.get(seed, [seed])))
            groups |= dict.fromkeys(united, united)
        self._add_copies(global_joins, groups)
        for root in roots:
            self._name_inputs(root, groups)
        self._name_copies(groups)
        for seed, name in self._input_names.items():
            self._stage_of[name] = [self._input_names[one] for one in groups.get(seed, [seed])]

    def _add_copies(self, global_joins: Sequence[Node], groups: dict[Seed, list[Seed]]) -> None:
        """Give each stage with a join a copy of the global table, as its last input."""
        for join in global_joins:
            table = cast("KeepTable", kept_in(cast("JoinTable", join.step).table)[0]).copy_of
            copies = self._copies.setdefault(table, [])
            seed = next(seeds(join))
            stage = groups.get(seed, [seed])
            if not any(copy in stage for copy in copies):
                copies.append(copy := Node(cast("JoinTable", join.step)))
                united = [*stage, copy]
                groups |= dict.fromkeys(united, united)

    def _name_copies(self, groups: Mapping[Seed, list[Seed]]) -> None:
        for table, copies in self._copies.items():
            for copy in copies:
                name = f"{table}-in-{self._input_names[groups[copy][0]]}"
                if name in self._input_names.values():
                    raise _copy_name_clash(table, name)
                self._input_names[copy] = name
                self._copy_names[name] = table

    def _name_inputs(self, node: Node, groups: Mapping[Seed, list[Seed]]) -> None:
        """Name the input after each `key_by` that follows `node`."""
        for child in node.children:
            for seed in groups.get(child, [child]):
                if isinstance(seed, Node) and opens_input(seed) and seed not in self._input_names:
                    self._input_names[seed] = self._input_name(seed, groups)
            self._name_inputs(child, groups)

    def _input_name(self, key_by: Node, groups: Mapping[Seed, list[Seed]]) -> str:
        given = cast(KeyBy, key_by.step).name
        name = given or _stage_name(key_by)
        taken = self._input_names.values()
        if given is None:
            # Several key_by before one merge can't all be named after the same handler.
            merged = {self._input_names.get(seed) for seed in groups.get(key_by, ())}
            number = 2
            while name in taken and name in merged:
                name, number = f"{_stage_name(key_by)}-{number}", number + 1
        if name in taken:
            raise _stage_name_clash(name)
        return name

    # --- chains ---------------------------------------------------------------------------------------

    def add_root(self, root: Node) -> None:
        source = self._topics[cast(Source, root.step).topic.name]
        if not root.children:
            raise JobError(
                f"The stream on topic {source.name!r} has nothing after it.",
                remedy="Add .process(handler) or .to(topic), or remove it.",
            )
        self._open_input(source.name, source, internal=False)
        for child in root.children:
            self._walk(child, source.name, ())

    def stages(self) -> list[Stage]:
        built: dict[str, Stage] = {}
        for opened in self._inputs:
            name, *_ = names = self._stage_of[opened]
            if name not in built:
                built[name] = self._stage(name, names)
        return list(built.values())

    def _stage(self, name: str, names: Sequence[str]) -> Stage:
        chains = [
            replace(chain, input=number)
            for number, one in enumerate(names)
            for chain in _tables_first(self._chains[one])
        ]
        inputs = [
            Input(*self._inputs[one], one, self._source_rule(self._inputs[one][0], self._chains[one]))
            for one in names
        ]
        own = [source for source in inputs if source.name not in self._copy_names]
        if len({codec_name(source.topic.key) for source in own}) > 1:
            joins = (step for chain in chains for step in chain.operators)
            are_joined = any(isinstance(step, JoinTable | JoinStreams | TellChanges) for step in joins)
            raise _different_keys(own, are_joined=are_joined)
        stores = tuple(dict.fromkeys(step.name for chain in chains for step in chain.stateful))
        changelog = changelog_topic(self._job, name) if stores else None
        return Stage(name, tuple(inputs), tuple(chains), stores, changelog, frozenset(self._topics))

    def _open_input(self, name: str, topic: TopicSpec, *, internal: bool) -> None:
        self._inputs.setdefault(name, (topic, internal))
        self._chains.setdefault(name, [])

    def _walk(self, node: Node, source: str, before: tuple[Operator, ...]) -> None:
        """Continue from the input `source`, after these operators."""
        step = node.step
        if isinstance(step, Sink):
            self._end_chain(source, before, None, self._topics[step.topic.name], step.on_error)
        elif isinstance(step, KeyBy):
            self._walk_key_by(node, step, source, before)
        elif isinstance(step, Operator):
            if isinstance(step, StatefulOperator):
                # Both sides of a join have its name. They meet in one node.
                self._claim_process_name(
                    step.name, node.children[0] if isinstance(step, JoinStreams) else node
                )
            if isinstance(step, JoinStreams) or (isinstance(step, Window) and step.may_be_late):
                _check_in_time(step, before)
            if isinstance(step, MapAsync):
                _check_before_calls(step, before)
            if isinstance(step, JoinTable):
                step = self._placed(step, source)
            if isinstance(step, KeepTable) and step.copy_of:
                self._walk_global(step, source)
            elif isinstance(step, KeptTable):
                self._walk_table(node, step, source, before)
            elif isinstance(step, Subscribe):
                self._walk_subscribe(node, step, source, before)
            else:
                self._walk_on(node, step, source, (*before, step))
        elif isinstance(step, Merge):
            self._walk_on(node, step, source, before)

    def _walk_on(
        self, node: Node, step: Merge | Operator, source: str, operators: tuple[Operator, ...]
    ) -> None:
        if not node.children:
            if isinstance(step, Branch) and step.is_rest:
                return
            if not isinstance(step, Process):
                raise JobError(
                    f"The stream on topic {self._inputs[source][0].name!r} ends in a {step_name(step)} with "
                    "nothing after it.",
                    remedy="Add .process(handler) or .to(topic), or remove it.",
                )
            self._end_chain(source, operators, None, None)
        stateful = [
            operator.name for operator in operators if isinstance(operator, StatefulOperator | MapAsync)
        ]
        if len(node.children) > 1 and stateful:
            raise JobError(
                f"The output of {stateful[-1]!r} is used in {len(node.children)} places, so it "
                "would run several times for each record.",
                remedy="Write it to a topic, and use the stream of that topic in each place: "
                "stream = stream.through(topic).",
            )
        for child in node.children:
            self._walk(child, source, operators)

    def _walk_table(self, node: Node, step: KeptTable, source: str, before: tuple[Operator, ...]) -> None:
        """The chain ends in the table. Those who follow its changes begin chains of their own."""
        if step.name not in self._joined_tables and not node.children:
            raise _unused_table(step.name, "stream.join(table), go on with table.to_stream()")
        if node.children:
            _check_followed(step, before)
        self._end_chain(source, (*before, replace(step, is_followed=bool(node.children))), None, None)
        if (step.name, source) in self._followed:
            return  # another path from the same input through a merge
        self._followed.add((step.name, source))
        for child in node.children:
            told = replace(cast("TellChanges", child.step), source=step.name)
            self._walk_on(child, told, source, (told,))

    def _walk_global(self, step: KeepTable, source: str) -> None:
        """Rows go to all shards of each stage with a copy, through a topic for each of these stages."""
        copies = self._copies.get(step.copy_of, ())
        if not copies:
            raise _unused_table(step.name, "stream.join(table, with_, on=...)")
        read, readers = self._inputs[source][0], list[tuple[str, TopicSpec]]()
        for copy in copies:
            name = self._input_names[copy]
            topic = TopicSpec(repartition_topic(self._job, name), read.key, step.value)
            readers.append((self._stage_of[name][0], topic))
            self._open_input(name, topic, internal=True)
            self._claim_process_name(name, copy)
            self._end_chain(name, (replace(step, name=name, on_error="stop"),), None, None)
        keeps_history = step.history_ms is not None
        broadcast = Broadcast(step.copy_of, tuple(readers), step.on_error, keeps_history)
        self._end_chain(source, (broadcast,), None, None)

    def _placed(self, step: JoinTable, source: str) -> JoinTable:
        """The join with the copy of a global table that its stage has."""
        kept = kept_in(step.table)[0]
        if not isinstance(kept, KeepTable) or not kept.copy_of:
            return step
        copies = (self._input_names[copy] for copy in self._copies[kept.copy_of])
        name = next(name for name in copies if name in self._stage_of[source])
        placed = replace(kept, name=name, on_error="stop")
        return replace(step, table=replaced_table(step.table, placed))

    def _walk_subscribe(self, node: Node, step: Subscribe, source: str, before: tuple[Operator, ...]) -> None:
        """The chain passes on left rows. The step itself writes the subscriptions."""
        subscriptions, rows = node.children
        name = self._input_names[subscriptions]
        topic = replace(step.topic, name=repartition_topic(self._job, name))
        self._walk(rows, source, (*before, replace(step, topic=topic)))
        if name not in self._inputs:  # otherwise another of the left table's inputs has set it
            self._open_input(name, topic, internal=True)
            for child in subscriptions.children:
                self._walk(child, name, ())

    def _walk_key_by(self, node: Node, step: KeyBy, source: str, before: tuple[Operator, ...]) -> None:
        read = self._inputs[source][0]
        what = f"key_by ({rekey_description(step.by)}) in the stream on topic {read.name!r}"
        if not node.children:
            raise JobError(
                f"The {what} has nothing after it.",
                remedy="Add .process(handler) or .to(topic), or remove it.",
            )
        changed = not all(map(_keeps_value, before))
        value: ValueKind = (step.value or "json") if changed else read.value
        if isinstance(step.by, str):
            check_field_of(value, step.by, f"The {what}", "key_by")
        if not opens_input(node):
            sink = cast(Sink, node.children[0].step)
            self._end_chain(source, before, step, self._topics[sink.topic.name], sink.on_error)
            return
        name = self._input_names[node]
        topic = TopicSpec(repartition_topic(self._job, name), step.key, step.value or value)
        known = self._inputs.get(name)
        if known is not None and kind_title(known[0].value) != kind_title(topic.value):
            raise JobError(
                f"The {what} would write {kind_title(topic.value)} values for some of its inputs, and "
                f"{kind_title(known[0].value)} values for others.",
                remedy="Say which: key_by(..., value=).",
            )
        self._end_chain(source, before, step, topic if known is None else known[0])
        if known is None:  # otherwise another path through a merge has set it
            self._open_input(name, topic, internal=True)
            for child in node.children:
                self._walk(child, name, ())

    def _end_chain(
        self,
        source: str,
        operators: tuple[Operator, ...],
        key_by: KeyBy | None,
        sink: TopicSpec | None,
        sink_rule: OnError | None = None,
    ) -> None:
        named = [operator.name for operator in operators if isinstance(operator, StatefulOperator)]
        named += [step.table for step in operators if isinstance(step, Broadcast)]
        plain = named[0] if named else f"{source}-to-{sink.name if sink else 'nowhere'}"
        taken = {chain.name for chains in self._chains.values() for chain in chains}
        name, number = plain, 2
        while name in taken:
            name, number = f"{plain}-{number}", number + 1
        rekey, version = (None, None) if key_by is None else (key_by.by, key_by.version)
        rekey_rule: OnError = "stop" if key_by is None else key_by.on_error
        if sink_rule is None:
            # An error while writing is the previous step's error.
            topic_rule = self._topic_rules.get(self._inputs[source][0].name)
            source_rule = _first_given(topic_rule, self._default_rule)
            in_front = operators[-1].on_error if operators else source_rule
            sink_rule = in_front if key_by is None else rekey_rule
        self._chains[source].append(Chain(name, operators, rekey, sink, version, rekey_rule, sink_rule))

    def _source_rule(self, source: TopicSpec, chains: Sequence[Chain]) -> OnError:
        """What to do with a record of `source` that can't be decoded."""
        begin = [chain for chain in chains if chain.follows is None]
        said = {
            _first_given(
                *(step.on_error for step in chain.operators if isinstance(step, StatefulOperator | Broadcast))
            )
            for chain in begin
        }
        agreed = said.pop() if len(said) == 1 else "stop"
        return _first_given(self._topic_rules.get(source.name), self._default_rule, agreed)

    def _claim_process_name(self, name: str, node: Node) -> None:
        if self._process_names.setdefault(name, node) is not node:
            if name in self._copy_names:
                raise _copy_name_clash(self._copy_names[name], name)
            raise JobError(
                f"Two handlers, windows, tables or joins of the job {self._job!r} are named {name!r}, and "
                "the name also identifies their state.",
                remedy="Give one of them another name with name=.",
            )


def _unused_table(name: str, use: str) -> JobError:
    return JobError(f"The table {name!r} is not used.", remedy=f"Join a stream with it, {use}, or remove it.")


def _first_given(*rules: Any) -> OnError:
    for rule in rules:
        if rule is not None:
            return rule
    return "stop"


def _different_keys(inputs: Sequence[Input], *, are_joined: bool) -> JobError:
    kinds = ", ".join(f"{source.topic.name!r} ({kind_title(source.topic.key)})" for source in inputs)
    if are_joined:
        return JobError(
            f"Topics are joined whose keys are of different kinds: {kinds}. Equal keys would be different "
            "bytes, and never meet.",
            remedy="Declare the topics with the same key=, or put key_by(..., key=) in front of the join.",
        )
    return JobError(
        f"Topics are merged whose keys are of different kinds: {kinds}. Equal keys would be different bytes, "
        "and so have different states.",
        remedy="Declare the topics with the same key=, or put key_by(..., key=) in front of some of them.",
    )


def _stage_name(key_by: Node) -> str:
    """The first handler after `key_by`, depth first. Without one, the first table that is joined, or the
    first topic written to.
    """
    names = list(_names_behind(key_by))
    for kind in (Process, JoinTable, Sink):
        for found, name in names:
            if found is kind:
                return name
    return "unnamed"


def _names_behind(node: Node) -> Iterator[tuple[type, str]]:
    for child in node.children:
        if isinstance(child.step, StatefulOperator):
            yield Process, child.step.name
        elif isinstance(child.step, JoinTable):
            yield JoinTable, f"with-{names_of_table(child.step.table)[0]}"
        elif isinstance(child.step, Sink):
            yield Sink, child.step.topic.name
        if not isinstance(child.step, KeyBy):
            yield from _names_behind(child)


def _check_in_time(step: Window | JoinStreams, before: Sequence[Operator]) -> None:
    """A step that needs records in time must not follow one whose results are late."""
    what = "window" if isinstance(step, Window) else "join"
    for former in before:
        if (isinstance(former, Window) and former.is_timed) or (
            isinstance(former, JoinStreams) and former.how != "inner"
        ):
            kind = "window" if isinstance(former, Window) else "join"
            remedy = _KEY_BETWEEN[kind]
            if isinstance(step, Window):
                remedy += " Or give it clock='processing', for which no record is late."
            raise JobError(
                f"The {what} {step.name!r} follows the {kind} {former.name!r} directly: results of "
                f"{former.name!r} would be too late for it, as event time has passed them.",
                remedy=remedy,
            )


_KEY_BETWEEN: Final = {
    "window": "Put .key_by('key') between them: results of windows have their key in that field.",
    "join": "Put .key_by(field or function) between them, of what the join's function returns. If the key is "
    "in none of the values, a handler in front of the join can put ctx.key there.",
}


def _check_before_calls(step: MapAsync, before: Sequence[Operator]) -> None:
    """Calls are made before the shard's state gets to see the record: what is called mustn't depend on it."""
    for former in before:
        if isinstance(former, StatefulOperator | JoinTable | TellChanges):
            raise JobError(
                f"The map_async {step.name!r} follows {step_name(former)}, in the same stage. Its calls are "
                "made in advance, when the state of the stage isn't that of the record yet.",
                remedy="Put .through(topic) or .key_by(...) between them, or map_async in front.",
            )


def _keeps_value(step: Operator) -> bool:
    """Whether the values behind it are encoded like those in front of it."""
    return isinstance(step, Filter | Peek | Branch) or (isinstance(step, TellChanges) and step.keeps_bytes)


def _check_followed(table: KeptTable, before: Sequence[Operator]) -> None:
    """Changes are followed record by record, so a table whose changes are told can't be filled as time
    passes.
    """
    for former in before:
        if (
            isinstance(former, Window)
            or (isinstance(former, JoinStreams) and former.how != "inner")
            or (isinstance(former, Process) and former.timers)
        ):
            raise JobError(
                f"The table {table.name!r} follows {former.name!r}, which has results as time passes, and "
                "its changes are used: they can't be told without a record.",
                remedy="Write the results to a topic, and declare the table over it: stream.to(topic), "
                "job.table(topic).",
            )


def _tables_first(chains: Sequence[Chain]) -> list[Chain]:
    """The chains of an input, in the order in which they process a record: in the order of the job file, but
    those that keep a table come first, and before all that read it.

    So a record of a topic that is both a table and a stream is in the table before others look it up.
    """
    ordered: list[Chain] = []

    def visit(chain: Chain) -> None:
        if chain in ordered:
            return
        read = {kept.name for step in chain.operators for kept in tables_read_by(step)}
        for other in chains:
            if other is not chain and any(table.name in read for table in other.tables):
                visit(other)
        ordered.append(chain)

    for chain in sorted(chains, key=lambda chain: not chain.tables):
        visit(chain)
    return ordered


def _stage_name_clash(name: str) -> JobError:
    return JobError(
        f"The stage after key_by would be named {name!r}, but a source topic or another stage of the job "
        "already has that name.",
        remedy="Rename the handler after it with name=, or the stage with key_by(..., name=).",
    )


def _copy_name_clash(table: str, name: str) -> JobError:
    stage = name.removeprefix(f"{table}-in-")
    return JobError(
        f"The copy of the global table {table!r} in the stage {stage!r} is named {name!r}. A topic, a stage, "
        "or a handler, window, table or join of the job already has that name.",
        remedy="Give that one another name, or the table: job.global_table(topic, name=).",
    )


def upstream_first(stages: list[Stage]) -> tuple[Stage, ...]:
    by_source = {topic: stage for stage in stages for topic in stage.topics}
    ordered: list[Stage] = []
    path: list[Stage] = []

    def visit(stage: Stage) -> None:
        if stage in ordered:
            return
        if stage in path:
            raise _loop([*path[path.index(stage) :], stage])
        path.append(stage)
        for topic in written_topics(stage):
            if topic.name in by_source:
                visit(by_source[topic.name])
        ordered.append(path.pop())

    # Depth-first order, reversed, is downstream last. Iterating backwards otherwise keeps the job file's
    # order.
    for stage in reversed(stages):
        visit(stage)
    return tuple(reversed(ordered))


def _loop(path: list[Stage]) -> JobError:
    names = ["+".join(stage.topics) for stage in path]
    steps = [step for stage in path for chain in stage.chains for step in chain.operators]
    table = next((step.table for step in steps if isinstance(step, Broadcast)), None)
    if table is not None:
        return JobError(
            f"The global table {table!r} is joined in a stage in front of it, or in the one that reads its "
            "topic: a loop.",
            remedy="Put a key_by in front of the join: stream.key_by(by, name=...).join(table, ...). Or have "
            "another job copy the topic, and declare the global table over the copy.",
        )
    join = next((step.table for step in steps if isinstance(step, Subscribe)), None)
    if join is not None:
        return JobError(
            f"The join {join!r} by a foreign key would lead back to a stage in front of it, because a topic "
            "is needed on both of its sides: a loop.",
            remedy="Copy the topic, job.stream(topic).to(copy), and declare another table over the copy.",
        )
    if len(path) == 2 and len(path[0].inputs) == 1:
        message = f"The job reads the topic {names[0]!r} and writes its results back to it: a loop."
    elif len(path) == 2:
        merged = ", ".join(map(repr, path[0].topics))
        message = f"The job merges {merged} and writes its results back to one of them: a loop."
    else:
        message = f"The topics {' -> '.join(names)} feed each other: a loop."
    return JobError(message, remedy="Write to a topic that the job doesn't read upstream.")
