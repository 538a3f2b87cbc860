"""Several embedded Kafka brokers that form one cluster on one machine: for tests, and to try out broker
failures.

Responsible for: what belongs to all of them (`cluster.json`: ports, the cluster's id, settings), and
starting, stopping and crashing one or all. `embedded` runs a single broker. Every broker is also a
controller. With three or more brokers, topics have three replicas, of which two must be in sync. So the death
of one broker loses nothing and stops nothing.

Invariants:
- A broker keeps its ports, because the other brokers and the clients know it by them.
- Every broker's memory is bounded (`heap_mb`).
- A cluster lives as long as this process (`EmbeddedCluster`), or survives it (`start_detached`).

In the data directory: `cluster.json`, and one directory `node-N` for each broker.
"""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Final

import msgspec

from fcluster.kafka import embedded as embedded_kafka
from fcluster.kafka import ports
from fcluster.kafka.embedded import Adapt, BrokerStatus, EmbeddedKafka, Member, NodePorts
from fcluster.kafka.jars import EmbeddedKafkaError, Progress

__all__ = [
    "EmbeddedCluster",
    "EmbeddedKafkaError",
    "is_cluster",
    "kill_detached",
    "nodes_of",
    "start_detached",
    "status",
    "stop_detached",
]

HEAP_MB: Final = 256
"""The time limit for each broker."""
NODES_MAX: Final = 9


class _Plan(msgspec.Struct, frozen=True):
    """`cluster.json`: the members of a cluster and their settings."""

    cluster_id: str
    nodes: Mapping[int, NodePorts]
    settings: Mapping[str, str] = {}

    def member(self, node: int) -> Member:
        return Member(node, self.nodes, self.cluster_id, self.settings)

    @property
    def bootstrap_servers(self) -> str:
        return ",".join(f"{at.host}:{at.port}" for at in self.nodes.values())


_decode_plan = msgspec.json.Decoder(_Plan).decode


def is_cluster(data_dir: Path | str) -> bool:
    """Whether `data_dir` belongs to a cluster of several brokers."""
    return (Path(data_dir) / "cluster.json").exists()


def nodes_of(data_dir: Path | str) -> list[int]:
    """The node ids of the cluster in `data_dir`, empty if there is none."""
    return list(_read_plan(Path(data_dir)).nodes) if is_cluster(data_dir) else []


class EmbeddedCluster:
    """Brokers that live as long as this object, or at most as this process. A context manager.

    If brokers of the cluster already run because they were started to survive their command, `start` uses
    those, and `stop` leaves them running.

    Args:
        data_dir: created if it doesn't exist. Nothing else may use it.
        nodes: the number of brokers, if the directory is new. It is odd, because a majority has to be up.
        heap_mb: the maximum heap of each broker.
        settings: Kafka's, in addition to ours, for all brokers. They are kept in the directory.
        adapt: takes a node id and that broker's settings, and returns those to use.
        places: for brokers on a network of their own: the address at which clients reach them, and a command
            that starts them there without forking.
    """

    def __init__(
        self,
        data_dir: Path | str,
        nodes: int = 3,
        heap_mb: int = HEAP_MB,
        *,
        settings: Mapping[str, str] | None = None,
        adapt: Callable[[int, dict[str, str]], dict[str, str]] | None = None,
        places: Mapping[int, tuple[str, Sequence[str]]] | None = None,
    ) -> None:
        self.data_dir = Path(data_dir).absolute()
        self._nodes = nodes
        self._heap_mb = heap_mb
        self._settings = settings
        self._adapt = adapt
        self._places = places or {}
        self._brokers: dict[int, EmbeddedKafka] = {}

    @property
    def nodes(self) -> list[int]:
        """The node ids; empty before the first start."""
        return list(self._brokers)

    @property
    def attached(self) -> bool:
        """Whether the brokers belong to another process and are only used here."""
        return any(broker.attached for broker in self._brokers.values())

    @property
    def bootstrap_servers(self) -> str:
        """The addresses of all brokers, including those that are down."""
        return _read_plan(self.data_dir).bootstrap_servers

    @property
    def pid(self) -> int | None:
        """The first broker's process id. None unless all brokers run and are ours."""
        found = [broker.pid for broker in self._brokers.values()]
        return None if not found or None in found else found[0]

    def pid_of(self, node: int) -> int | None:
        """The process id of one broker. None if it doesn't run or isn't ours."""
        return self._brokers[node].pid

    def start(self, progress: Progress | None = None) -> str:
        """Starts the brokers that don't run, waits until they answer, and returns the bootstrap servers of
        all.

        Raises:
            EmbeddedKafkaError: one can't be started; the remedy names alternatives.
            DirectoryInUse: they belong to another process.
        """
        hosts = {node: host for node, (host, _) in self._places.items()}
        plan = _make_plan(self.data_dir, self._nodes, self._settings, hosts)
        for node in plan.nodes:
            if node not in self._brokers:
                self._brokers[node] = EmbeddedKafka(
                    _node_directory(self.data_dir, node),
                    self._heap_mb,
                    adapt=self._adapt_of(node),
                    member=plan.member(node),
                    prefix=self._places[node][1] if node in self._places else (),
                )
        self.start_nodes(plan.nodes, progress)
        return plan.bootstrap_servers

    def start_nodes(self, nodes: Iterable[int], progress: Progress | None = None) -> None:
        """Starts these brokers in parallel and waits until they answer, which requires a majority of all
        brokers.

        Raises: as `start`.
        """
        _side_by_side(lambda node: self._brokers[node].start(progress), nodes)

    def start_node(self, node: int, progress: Progress | None = None) -> None:
        """Starts one broker on its ports, unless it runs, and waits until it is part of the cluster again.

        Raises: as `start`.
        """
        self.start_nodes([node], progress)

    def stop_node(self, node: int) -> None:
        """Stops one broker cleanly (it hands its partitions over) and waits until it has exited."""
        self._brokers[node].stop()

    def kill_node(self, node: int) -> None:
        """Kills one broker (`kill -9`), like a crash."""
        self._brokers[node].kill()

    def pause_node(self, node: int) -> None:
        """Suspends one broker (SIGSTOP): its connections stay open, but it answers nothing."""
        self._signal(node, signal.SIGSTOP)

    def resume_node(self, node: int) -> None:
        """Resumes it (SIGCONT)."""
        self._signal(node, signal.SIGCONT)

    def stop(self) -> None:
        """Stops all of our brokers in parallel and waits until they have exited."""
        _side_by_side(self.stop_node, self._brokers)

    def kill(self) -> None:
        """Kills all of them, like a crash of the machine."""
        _side_by_side(self.kill_node, self._brokers)

    def __enter__(self) -> EmbeddedCluster:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _adapt_of(self, node: int) -> Adapt:
        adapt = self._adapt
        return dict if adapt is None else lambda settings: adapt(node, settings)

    def _signal(self, node: int, number: signal.Signals) -> None:
        pid = self._brokers[node].pid
        if pid is None:
            raise ValueError(f"broker {node} doesn't run")
        os.kill(pid, number)


# --- brokers that survive their command ----------------------------------------------------------------


def start_detached(
    data_dir: Path | str,
    nodes: int = 3,
    heap_mb: int = HEAP_MB,
    progress: Progress | None = None,
    *,
    settings: Mapping[str, str] | None = None,
    only: Sequence[int] = (),
) -> str:
    """Starts brokers that survive this process, or finds running ones. Returns the bootstrap servers of all.

    Args:
        data_dir: the cluster's directory.
        nodes: the number of brokers, if the directory is new.
        heap_mb: the maximum heap of each broker.
        progress: called with progress messages.
        settings: Kafka's, in addition to ours; kept in the directory.
        only: start only these.

    Raises: as `EmbeddedCluster.start`.
    """
    directory = Path(data_dir).absolute()
    plan = _make_plan(directory, nodes, settings)

    def start(node: int) -> None:
        embedded_kafka.start_detached(_node_directory(directory, node), heap_mb, progress, plan.member(node))

    _side_by_side(start, _known(plan, only))
    return plan.bootstrap_servers


def stop_detached(data_dir: Path | str, only: Sequence[int] = ()) -> bool:
    """Stops the brokers (or `only` these) cleanly. False if none of them ran.

    Raises:
        DirectoryInUse: they belong to a process that is still running.
    """
    return _end_detached(Path(data_dir), only, embedded_kafka.stop_detached)


def kill_detached(data_dir: Path | str, only: Sequence[int] = ()) -> bool:
    """Kills the brokers (or `only` these), like a crash. False if none of them ran.

    Raises: as `stop_detached`.
    """
    return _end_detached(Path(data_dir), only, embedded_kafka.kill_detached)


def status(data_dir: Path | str) -> dict[int, BrokerStatus]:
    """The status of each broker of the cluster, by node id."""
    directory = Path(data_dir).absolute()
    found = dict[int, BrokerStatus]()

    def look(node: int) -> None:
        found[node] = embedded_kafka.status(_node_directory(directory, node))

    nodes = nodes_of(directory)
    _side_by_side(look, nodes)
    return {node: found[node] for node in nodes}


def _end_detached(data_dir: Path, only: Sequence[int], end: Callable[[Path], bool]) -> bool:
    directory = data_dir.absolute()
    ended: list[bool] = []
    nodes = _known(_read_plan(directory), only)
    _side_by_side(lambda node: ended.append(end(_node_directory(directory, node))), nodes)
    return any(ended)


# --- the plan ------------------------------------------------------------------------------------------


def _known(plan: _Plan, only: Sequence[int]) -> list[int]:
    unknown = [node for node in only if node not in plan.nodes]
    if unknown:
        raise EmbeddedKafkaError(
            f"there is no broker {unknown[0]} in this cluster", remedy=f"It has {_list(plan.nodes)}."
        )
    return list(only) or list(plan.nodes)


def _list(nodes: Iterable[int]) -> str:
    return "the brokers " + ", ".join(map(str, nodes))


def _make_plan(
    directory: Path,
    nodes: int,
    settings: Mapping[str, str] | None,
    hosts: Mapping[int, str] | None = None,
) -> _Plan:
    """The plan of the cluster in `directory`, created if it is new. It gets other ports if none of its
    brokers runs and another program has taken some of them.
    """
    if nodes % 2 == 0 or not 1 <= nodes <= NODES_MAX:
        raise EmbeddedKafkaError(
            f"a cluster of {nodes} embedded brokers makes no sense, because a majority has to be up",
            remedy=f"Choose an odd number of at most {NODES_MAX}; 3 brokers survive the death of one.",
        )
    with _only_one(directory):
        old = _read_plan(directory) if is_cluster(directory) else None
        if old is None and (directory / "broker.json").exists():
            raise EmbeddedKafkaError(
                f"{directory} has the data of a single broker, which can't become one of several",
                remedy="Choose another directory (--data-dir).",
            )
        if old is None:
            old = _Plan(embedded_kafka.new_cluster_id(), {}, settings or {})
        elif settings is not None:
            old = msgspec.structs.replace(old, settings=settings)
        count = len(old.nodes) or nodes
        if any(embedded_kafka.is_running(_node_directory(directory, node)) for node in old.nodes):
            return old
        wanted = [port for at in old.nodes.values() for port in (at.port, at.controller_port)]
        given = ports.reserve_for_directory(directory, 2 * count, wanted)
        plan = msgspec.structs.replace(
            old,
            nodes={
                node: NodePorts(port, controller_port, (hosts or {}).get(node, embedded_kafka.LOOPBACK))
                for node, port, controller_port in zip(
                    range(1, count + 1), given[::2], given[1::2], strict=True
                )
            },
        )
        unfinished = directory / "cluster.json.partial"
        unfinished.write_bytes(msgspec.json.encode(plan))
        unfinished.replace(directory / "cluster.json")
        return plan


def _read_plan(directory: Path) -> _Plan:
    try:
        return _decode_plan((directory / "cluster.json").read_bytes())
    except FileNotFoundError:
        raise EmbeddedKafkaError(
            f"there is no cluster of embedded brokers in {directory}",
            remedy="Start one with `fcluster kafka start --nodes 3`.",
        ) from None
    except (OSError, msgspec.DecodeError) as error:
        raise EmbeddedKafkaError(
            f"can't read {directory / 'cluster.json'}, which says where the brokers listen: {error}",
            remedy="Choose another directory (--data-dir), or remove this one and its data.",
        ) from error


@contextmanager
def _only_one(directory: Path) -> Generator[None]:
    """Only one process at a time creates or changes the plan."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / "cluster.lock").open("ab")
    except OSError as error:
        raise EmbeddedKafkaError(
            f"cannot use {directory} as the embedded brokers' data directory: {error.strerror}",
            remedy="Choose a directory that you may write to (--data-dir).",
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _node_directory(directory: Path, node: int) -> Path:
    return directory / f"node-{node}"


def _side_by_side(do: Callable[[int], object], nodes: Iterable[int]) -> None:
    """Call the function for each node, each in its own thread. The first error is raised once all are
    done.
    """
    wanted = list(nodes)
    if not wanted:
        return
    with ThreadPoolExecutor(len(wanted), thread_name_prefix="broker") as threads:
        futures = [threads.submit(do, node) for node in wanted]
    for future in futures:
        future.result()
