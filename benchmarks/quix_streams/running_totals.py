"""The benchmarks' jobs for Quix Streams, which has a virtual environment of its own: see `benchmarks.peers`.

Arguments: bootstrap servers, consumer group, source, output, state directory, job ("totals", "regrouped",
"stateless"), guarantee ("exactly-once", "at-least-once"), seconds from one commit to the next.
"""

import sys

from quixstreams import Application

GROUPS = 500

brokers, group, source, output, directory, job, guarantee, commit_interval_s = sys.argv[1:]

app = Application(
    broker_address=brokers,
    consumer_group=group,
    processing_guarantee=guarantee,
    commit_interval=float(commit_interval_s),
    auto_offset_reset="earliest",
    auto_create_topics=True,
    state_dir=directory,
    producer_extra_config={"partitioner": "murmur2_random"},
    loglevel="WARNING",
)


def totals(record, state):
    count, total = state.get("totals", (0, 0))
    count, total = count + 1, total + record["value"]
    state.set("totals", (count, total))
    return {"id": record["id"], "key": record["key"], "count": count, "sum": total, "at": record["at"]}


def convert(record):
    return {
        "id": record["id"],
        "key": record["key"],
        "count": 1,
        "sum": 2 * record["value"],
        "at": record["at"],
    }


def group_of(record):
    return f"g{int(record['key'][1:]) % GROUPS}"


frame = app.dataframe(app.topic(source, value_deserializer="json"))
if job == "regrouped":
    frame = frame.group_by(group_of, name="group")
frame = frame.apply(convert) if job == "stateless" else frame.apply(totals, stateful=True)
frame.to_topic(app.topic(output, value_serializer="json"))
app.run()
