"""What a job file has declared so far: topics with their rules, codecs, and the graph of streams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Final, Literal, cast

from fcluster.api.builder import Builder, upstream_first
from fcluster.api.checks import check_function, check_name, given
from fcluster.api.nodes import Merge, Node, Source
from fcluster.common.errors import JobError
from fcluster.common.failures import bounded_repr
from fcluster.common.ids import colliding_topic, is_internal_topic, journal_topic, repartition_topic
from fcluster.common.isolation import Isolation
from fcluster.common.settings import Settings
from fcluster.graph.codecs import UNNAMED_KEY_BY, Codec, CodecUse, Kind, ModelCodec, bound_codec, kind_title
from fcluster.graph.models import check_key_model, declared_kind
from fcluster.graph.operators import KeyKind, OnError, TopicSpec, ValueKind
from fcluster.graph.stages import with_event_time, with_timestamps
from fcluster.graph.states import MapState, State, StateStore, check_states
from fcluster.graph.timestamps import Timestamp, check_timestamp, timestamp_text
from fcluster.graph.topology import Topology
from fcluster.graph.watermark import Watermark

_INTERNAL_SUFFIXES: Final = ("-changelog", "-repartition")


class Declarations:
    """Collects what `Job` and its streams declare, and checks it against what was declared before.

    Attributes:
        job: the job's name.
        default_rule: `on_error` of the job, or None.
        roots: the nodes of the topics that are read.
        merges: the nodes where streams are merged.
        joins: the nodes of joins, with tables and of two streams.
        global_joins: the nodes of joins with global tables.
    """

    def __init__(self, job: str) -> None:
        self.job = job
        self.default_rule: OnError | None = None
        self.roots: list[Node] = []
        self.merges: list[Node] = []
        self.joins: list[Node] = []
        self.global_joins: list[Node] = []
        self._begun: dict[str, None] = {}
        """The windows and groups that have no aggregates yet, in words and in order."""
        self._topics: dict[str, TopicSpec] = {}
        self._topic_rules: dict[str, OnError | None] = {}
        self._watermarks: dict[str, Watermark] = {}
        self._timestamps: dict[str, Timestamp] = {}
        self._isolation_unset: set[str] = set()
        self._named: set[str] = set()
        """Topics that aren't declared: a stream is written to them by name."""
        self._bound_codecs: dict[tuple[str, str, Codec[Any]], Kind] = {}
        self._codec_settings: dict[str, Any] = {}

    def topic(
        self,
        name: str,
        key: KeyKind | type[Any],
        value: ValueKind | type[Any],
        isolation: Isolation | None,
        watermark: Watermark | None,
        timestamp: Timestamp | None,
        on_error: OnError | None,
    ) -> TopicSpec[Any, Any]:
        """Declare a topic. See `Job.topic`."""
        self._check_topic_name(name)
        key, value = self.bound(key, name, "key"), self.bound(value, name, "value")
        topic = TopicSpec(name, key, value, isolation or "read-committed")
        rule = None if on_error is None else self.rule(on_error, f"the topic {name!r}")
        known = self._topics.get(name)
        if known is not None and (known, known.isolation) != (topic, topic.isolation):
            raise _declared_differently(known, topic, by_name=name in self._named)
        self._set_topic_rule(name, rule)
        self._set_watermark(name, watermark)
        self._set_timestamp(topic, timestamp)
        if known is None and isolation is None:
            self._isolation_unset.add(name)
        elif isolation is not None:
            self._isolation_unset.discard(name)
        return self._topics.setdefault(name, topic)

    def source(
        self, topic: TopicSpec, where: str, watermark: Watermark | None, on_error: OnError | None
    ) -> Node:
        """A new root of the graph: the records of `topic`, for `where` in the job file."""
        self.check_declared(topic, where)
        if on_error is not None:
            self._set_topic_rule(topic.name, self.rule(on_error, where))
        self._set_watermark(topic.name, watermark)
        root = Node(Source(topic))
        self.roots.append(root)
        return root

    def join_up(self, nodes: Sequence[Node], unions: list[Node]) -> Node:
        """A node where the records of `nodes` become one stream. It is added to `unions`."""
        union = Node(Merge(), tuple(nodes))
        for node in nodes:
            node.children.append(union)
        unions.append(union)
        return union

    def begin(self, what: str) -> None:
        """Windows or groups, in words, of which it isn't said yet what to compute."""
        self._begun[what] = None

    def complete(self, what: str) -> None:
        """It is said what to compute of what was begun."""
        self._begun.pop(what, None)

    def build(self, settings: Settings) -> Topology:
        """Compile the graph. See `Job.build`."""
        for what in self._begun:
            raise JobError(
                f"It isn't said what to compute of {what}.", remedy="Add .aggregate(n=count()), or remove it."
            )
        default = settings.isolation_level
        self._codec_settings.update(settings.as_mapping())
        topics = {
            name: replace(topic, isolation=default) if name in self._isolation_unset else topic
            for name, topic in self._topics.items()
        }
        builder = Builder(self.job, topics, self._topic_rules, self.default_rule)
        builder.lay_out(self.roots, self.merges, self.joins, self.global_joins)
        for root in self.roots:
            builder.add_root(root)
        stages = builder.stages()
        if not stages:
            raise JobError(
                f"The job {self.job!r} has no handlers.",
                remedy="Decorate a function with @job.process(topic, to=...), or use job.stream(topic).",
            )
        read = {topic for stage in stages for topic in stage.topics}
        declared = {topic: watermark for topic, watermark in self._watermarks.items() if topic in read}
        stages = with_timestamps(with_event_time(stages, declared), self._timestamps)
        return Topology(self.job, upstream_first(stages), topics=tuple(topics.values()))

    def stores(self, handler: str, states: object) -> tuple[StateStore, ...]:
        """A handler's declared states, with codecs that know the run's settings."""
        stores: list[StateStore] = []
        for declared in check_states(handler, states):
            name = f"{handler}/{declared.name}"
            former = {
                version: replace(one, value=self.bound(one.value, name, "state"))
                for version, one in declared.migrations.items()
            }
            state = replace(declared, value=self.bound(declared.value, name, "state"), migrate=former)
            if isinstance(state, MapState):
                state = self._with_bound_key(cast("MapState[Any, Any]", state), name)
            stores.append(StateStore(handler, declared, state))
        return tuple(stores)

    def _with_bound_key(self, state: MapState[Any, Any], name: str) -> State:
        if not isinstance(state.key, Codec):
            return state
        return replace(state, key=cast("Codec[Any]", self.bound(state.key, name, "key")))

    def repartition_topic(self, name: str | None) -> str:
        """The topic of a `key_by` with that name. Without a name its topic isn't known yet."""
        return UNNAMED_KEY_BY if name is None else repartition_topic(self.job, name)

    def bound(self, kind: Kind | type[Any], name: str, part: Literal["key", "value", "state"]) -> Kind:
        """A kind as it is declared, with codecs for one use. They are the same objects each time, because
        topics are compared.
        """
        kind = declared_kind(kind, part)
        if isinstance(kind, ModelCodec) and part == "key":
            check_key_model(kind, repr(name))
        if not isinstance(kind, Codec):
            return kind
        known = self._bound_codecs.get((name, part, kind))
        if known is None:
            # The settings are known when `build` runs, and a codec is opened later still.
            known = bound_codec(kind, CodecUse(name, part, MappingProxyType(self._codec_settings)))
            for one in (kind, known):
                self._bound_codecs[name, part, cast("Codec[Any]", one)] = known
        return known

    def rule(self, on_error: OnError | None, what: str) -> OnError:
        """`on_error` of `what`, after checks. The job's default if it is None."""
        if on_error is None:
            return self.default_rule or "stop"
        if isinstance(on_error, TopicSpec):
            self.check_declared(on_error, "on_error=")
        elif on_error not in ("stop", "skip"):
            raise JobError(
                f"on_error={bounded_repr(on_error)} of {what} is unknown.",
                remedy="Use on_error='stop', 'skip', or a topic for dead letters: "
                "job.topic('dead-letters', value='bytes'), or Topic(...) for the whole job.",
            )
        return on_error

    def _set_topic_rule(self, name: str, rule: OnError | None) -> None:
        known = self._topic_rules.get(name)
        if None not in (known, rule) and known != rule:
            raise JobError(
                f"The topic {name!r} has two on_error rules for records that can't be decoded: {known!r} "
                f"and {rule!r}.",
                remedy="A record is decoded once for all its handlers, so give on_error in one place.",
            )
        self._topic_rules[name] = rule if known is None else known

    def _set_watermark(self, name: str, watermark: Watermark | None) -> None:
        if watermark is None:
            return
        if not isinstance(watermark, Watermark):  # pyright: ignore[reportUnnecessaryIsInstance]  a user's
            raise JobError(
                f"watermark={bounded_repr(watermark)} of the topic {name!r} is not a Watermark.",
                remedy="Use watermark=Watermark(max_delay=seconds(5)), from fcluster.",
            )
        known = self._watermarks.setdefault(name, watermark)
        if known != watermark:
            raise JobError(
                f"The topic {name!r} has two watermarks: {known} and {watermark}.",
                remedy="A shard has one event time, so give it in one place.",
            )

    def _set_timestamp(self, topic: TopicSpec, timestamp: Timestamp | None) -> None:
        if timestamp is None:
            return
        check_timestamp(topic.name, topic.value, timestamp)
        if not isinstance(timestamp, str):
            check_function(timestamp, "timestamp", ("value",))
        known = self._timestamps.setdefault(topic.name, timestamp)
        if known != timestamp:
            raise JobError(
                f"The topic {topic.name!r} has two timestamps: {timestamp_text(known)} and "
                f"{timestamp_text(timestamp)}.",
                remedy="A record has one time, so give it in one place.",
            )

    def target(self, topic: TopicSpec | str, where: str, key: KeyKind, value: ValueKind) -> TopicSpec:
        """The topic that is written, for `where` in the job file. If no topic of that name is declared, it
        has the kinds `key` and `value`, those of the stream.
        """
        if not isinstance(topic, str):
            self.check_declared(topic, where)
            return topic
        known = self._topics.get(topic)
        if known is not None:
            return known
        for part, kind in (("keys", key), ("values", value)):
            if isinstance(kind, Codec) and not isinstance(kind, ModelCodec):
                raise JobError(
                    f"{where} got the name {topic!r} of a topic that isn't declared, and the {part} of this "
                    f"stream have a codec ({kind_title(kind)}).",
                    remedy=f"Declare it, topic = job.topic({topic!r}, key=..., value=...), and pass topic.",
                )
        self._named.add(topic)
        return self.topic(topic, key, value, None, None, None, None)

    def check_declared(self, topic: TopicSpec, where: str) -> None:
        """Refuse what is not a topic of this job. `where` says where in the job file it was given."""
        if not isinstance(topic, TopicSpec):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise JobError(
                f"{where} got {given(topic)}, not a topic.",
                remedy=_topic_remedy(where, topic),
            )
        if self._topics.get(topic.name) != topic:
            raise JobError(
                f"{where} got the topic {topic.name!r}, which was not declared on the job {self.job!r}.",
                remedy=f"Use the topic that job.topic({topic.name!r}) of this job returns.",
            )

    def _check_topic_name(self, name: str) -> None:
        check_name(name, "The topic name")
        internal = name.startswith(f"{self.job}-") and name.endswith(_INTERNAL_SUFFIXES)
        if internal or is_internal_topic(name) or name == journal_topic(self.job) or name.startswith("__"):
            raise JobError(
                f"The topic name {name!r} is reserved for internal topics.",
                remedy="Choose a name that doesn't look like <job>-...-changelog or <job>-...-repartition "
                "(with or without a suffix), <job>-journal or __...",
            )
        other = colliding_topic(name, self._topics)
        if other is not None:
            raise JobError(
                f"The topics {other!r} and {name!r} can't both exist: Kafka treats '.' and '_' in topic "
                "names as equal.",
                remedy="Correct the misspelt one, or rename one of them.",
            )


def _declared_differently(known: TopicSpec, topic: TopicSpec, *, by_name: bool) -> JobError:
    """A topic is declared that is known in another way. `by_name`: it was written by name before."""
    name, difference = topic.name, _difference(known, topic)
    if not by_name:
        return JobError(
            f"The topic {name!r} is declared twice, in different ways: {difference}.",
            remedy="Declare it once and use the returned topic everywhere.",
        )
    return JobError(
        f"The topic {name!r} was first used by its name, with the kinds of the stream that is written to it, "
        f"and is declared in another way behind that: {difference}.",
        remedy=f"Declare it before it is used, topic = job.topic({name!r}, ...), and write to topic.",
    )


def _difference(one: TopicSpec, other: TopicSpec) -> str:
    """In what two declarations of a topic differ, as a job file would say it."""
    parts = {
        "key": [kind_title(one.key), kind_title(other.key)],
        "value": [kind_title(one.value), kind_title(other.value)],
        "isolation": [one.isolation, other.isolation],
    }
    found = [
        f"{part}={first!r} and {part}={second!r}"
        for part, (first, second) in parts.items()
        if first != second
    ]
    return ", ".join(found) or "with two codecs of one name"


_WRITING = ("late=", "through()", "to()", "to=")
"""Where a topic is given that is written."""


def _topic_remedy(where: str, got: object) -> str:
    if isinstance(got, list | tuple):
        if where == "merge()":
            return "Pass topics one by one, without brackets: merge(one, other)."
        if where in _WRITING:
            return "It takes one topic. Write the stream to each of them: stream.to(one), stream.to(other)."
        return "It takes one topic. A stream of several is job.merge(one, other)."
    if isinstance(got, str):
        return f"Declare it, topic = job.topic({bounded_repr(got)}), and pass topic."
    return "Pass what job.topic('...') returns."
