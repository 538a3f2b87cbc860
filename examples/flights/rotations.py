"""Sessions of aircraft: its flights from New York with at most twelve hours between them.

Flights of the same minute come in any order. So the watermark has a delay of 1 ms: event time reaches a
minute when a later one has come, and a flight exactly twelve hours after the last one is never too late.

    fcluster up examples/flights/rotations.py
"""

from datetime import timedelta

from fcluster import Job, Session, Watermark, count, first, last, sum_

job = Job("aircraft-rotations")
schedule = job.topic("schedule", timestamp="scheduled", watermark=Watermark(max_delay_ms=1))
rotations = job.topic("aircraft-rotations")

(
    job.stream(schedule)
    .filter(lambda flight: flight["tailnum"] is not None and flight["dep_delay"] is not None)
    .key_by("tailnum")
    .window(Session(timedelta(hours=12)), name="rotation")
    .aggregate(
        flights=count(),
        miles=sum_(lambda flight: flight["distance"]),
        first=first(lambda flight: flight["origin"]),
        last=last(lambda flight: flight["dest"]),
    )
    .to(rotations)
)
