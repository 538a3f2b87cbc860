"""Sessions of aircraft: its flights from New York with at most twelve hours between them.

Flights of the same minute come in any order. That changes nothing: a session takes flights of its last minute
until one of a later minute has come.

    python examples/flights/load.py --brokers HOST:PORT --by-time
    fcluster up examples/flights/rotations.py
"""

from fcluster import Job, Session, count, first, hours, last, sum_

job = Job("aircraft-rotations")
schedule = job.topic("schedule", timestamp="scheduled")
rotations = job.topic("aircraft-rotations")

(
    job.stream(schedule)
    .filter(lambda flight: flight["tailnum"] is not None and flight["dep_delay"] is not None)
    .key_by("tailnum")
    .window(Session(hours(12)), name="rotation")
    .aggregate(
        flights=count(),
        miles=sum_(lambda flight: flight["distance"]),
        first=first(lambda flight: flight["origin"]),
        last=last(lambda flight: flight["dest"]),
    )
    .to(rotations)
)
