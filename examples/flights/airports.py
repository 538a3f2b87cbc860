"""Delays by airport and hour: windows of the time at which flights have really departed, with late data.

The topic `departures` has the flights in the order in which they should have departed, keyed by airport. A
flight that departs hours after its time comes hours too early in that order, and those behind it are out of
order. A window waits for them three quarters of an hour; what comes later than that goes to a topic of its
own.

    python examples/flights/load.py --brokers HOST:PORT --by-time
    fcluster up examples/flights/airports.py
"""

from datetime import timedelta

from fcluster import Job, Tumbling, Watermark, count, max_, sum_

HALF_AN_HOUR_MS = 30 * 60_000
LONG_MINUTES = 15

job = Job("airport-delays")
departures = job.topic("departures", timestamp="departed", watermark=Watermark(max_delay_ms=HALF_AN_HOUR_MS))
hours = job.topic("airport-hours")
late = job.topic("departures-late")


def delay(flight):
    """In minutes; negative if it departs early."""
    return flight["dep_delay"]


(
    job.stream(departures)
    .window(Tumbling(timedelta(hours=1), grace=timedelta(minutes=15)), late=late, name="airport-hour")
    .aggregate(
        flights=count(),
        delayed=sum_(lambda flight: delay(flight) > LONG_MINUTES),
        minutes=sum_(delay),
        worst=max_(delay),
    )
    .to(hours)
)
