"""The benchmarks' jobs for PyFlink, which has a virtual environment of its own: see `benchmarks.peers`.

Arguments: bootstrap servers, consumer group, source, output, state directory, job ("totals", "regrouped",
"stateless"), guarantee ("exactly-once", "at-least-once"), milliseconds from one checkpoint to the next,
parallelism, execution mode ("process", "thread"), directory of the jars.

The first operator reads the key out of the value, since a source's own schemas pass on values alone.
"""

import sys
from pathlib import Path

import orjson
from pyflink.common import Configuration, Row, Types, WatermarkStrategy
from pyflink.common.serialization import ByteArraySchema, SerializationSchema
from pyflink.datastream import KeyedProcessFunction, RuntimeContext, StreamExecutionEnvironment
from pyflink.datastream.connectors.base import DeliveryGuarantee
from pyflink.datastream.connectors.kafka import (
    KafkaOffsetsInitializer,
    KafkaRecordSerializationSchema,
    KafkaSink,
    KafkaSource,
)
from pyflink.datastream.state import ValueStateDescriptor
from pyflink.java_gateway import get_gateway

GROUPS = 500
BYTES = Types.PRIMITIVE_ARRAY(Types.BYTE())
RECORD = Types.ROW([Types.LONG(), Types.STRING(), Types.LONG(), Types.LONG()])
OUTPUT = Types.ROW([BYTES, BYTES])
TRANSACTION_TIMEOUT_MS = 600_000


def parse(value):
    record = orjson.loads(value)
    return Row(record["id"], record["key"], record["value"], record["at"])


def output(number, key, count, total, at):
    value = orjson.dumps({"id": number, "key": key, "count": count, "sum": total, "at": at})
    return Row(key.encode(), value)


def convert(value):
    record = orjson.loads(value)
    return output(record["id"], record["key"], 1, 2 * record["value"], record["at"])


class Totals(KeyedProcessFunction):
    def open(self, runtime_context: RuntimeContext):
        kind = Types.ROW([Types.LONG(), Types.LONG()])
        self.totals = runtime_context.get_state(ValueStateDescriptor("totals", kind))

    def process_element(self, value, ctx):
        number, key, amount, at = value
        count, total = self.totals.value() or (0, 0)
        count, total = count + 1, total + amount
        self.totals.update(Row(count, total))
        yield output(number, key, count, total, at)


def main(brokers, group, source, target, directory, job, guarantee, checkpoint_ms, parallelism, mode, jars):
    state, exactly_once = Path(directory), guarantee == "exactly-once"
    for name in ("checkpoints", "tmp"):
        (state / name).mkdir(parents=True, exist_ok=True)
    settings = {
        "parallelism.default": parallelism,
        "python.executable": sys.executable,
        "python.execution-mode": mode,
        "state.backend.type": "rocksdb",
        "execution.checkpointing.incremental": "true",
        "execution.checkpointing.dir": (state / "checkpoints").as_uri(),
        "execution.checkpointing.mode": "EXACTLY_ONCE" if exactly_once else "AT_LEAST_ONCE",
        "execution.checkpointing.interval": f"{checkpoint_ms} ms",
        # What isn't passed on to Python, or back, for so long is passed on then, even if it is little.
        "python.fn-execution.bundle.time": checkpoint_ms,
        "io.tmp.dirs": str(state / "tmp"),
        # An error ends the program; it isn't measured how Flink goes on after it.
        "restart-strategy.type": "none",
    }
    configuration = Configuration()
    for name, value in settings.items():
        configuration.set_string(name, value)
    environment = StreamExecutionEnvironment.get_execution_environment(configuration)
    environment.add_jars(*(path.as_uri() for path in Path(jars).glob("*.jar")))
    environment.add_classpaths(f"{Path(jars).as_uri()}/")

    stream = environment.from_source(
        KafkaSource.builder()
        .set_bootstrap_servers(brokers)
        .set_group_id(group)
        .set_topics(source)
        .set_starting_offsets(KafkaOffsetsInitializer.earliest())
        .set_value_only_deserializer(ByteArraySchema())
        .build(),
        WatermarkStrategy.no_watermarks(),
        "source",
        BYTES,
    )
    if job == "stateless":
        stream = stream.map(convert, OUTPUT)
    else:
        records = stream.map(parse, RECORD)
        if job == "regrouped":
            records = records.key_by(lambda record: int(record[1][1:]) % GROUPS, Types.LONG())
        else:
            records = records.key_by(lambda record: record[1], Types.STRING())
        stream = records.process(Totals(), OUTPUT)

    column = get_gateway().jvm.fcluster.benchmarks.Column
    serializer = (
        KafkaRecordSerializationSchema.builder()
        .set_topic(target)
        .set_key_serialization_schema(SerializationSchema(column(0)))
        .set_value_serialization_schema(SerializationSchema(column(1)))
        .build()
    )
    stream.sink_to(
        KafkaSink.builder()
        .set_bootstrap_servers(brokers)
        .set_record_serializer(serializer)
        .set_delivery_guarantee(
            DeliveryGuarantee.EXACTLY_ONCE if exactly_once else DeliveryGuarantee.AT_LEAST_ONCE
        )
        .set_transactional_id_prefix(group)
        .set_property("transaction.timeout.ms", str(TRANSACTION_TIMEOUT_MS))
        .build()
    )
    environment.execute(group)


if __name__ == "__main__":
    main(*sys.argv[1:])
