"""Readings of electricity meters: windows of each meter, and of each district behind a key_by.

Each quarter of an hour of a meter gives what it used and its peak. A quarter waits a minute for readings that
come late; later ones go to a topic of their own. Each quarter of an hour, a district gets its last hour: how
much its meters used, and which two readings were the highest.

    fcluster up examples/meters/meters.py
"""

from datetime import timedelta

from fcluster import Hopping, Job, Tumbling, Watermark, count, max_, sum_, top_n

job = Job("meters")
readings = job.topic("readings", watermark=Watermark(max_delay=timedelta(seconds=10)))
quarters = job.topic("meter-quarters")
late = job.topic("readings-late")
hours = job.topic("district-hours")

QUARTER = timedelta(minutes=15)


def watt_hours(reading):
    """What a meter has used since its last reading."""
    return reading["wh"]


(
    job.stream(readings)
    .window(Tumbling(QUARTER, grace=timedelta(minutes=1)), late=late, name="quarter")
    .aggregate(readings=count(), wh=sum_(watt_hours), peak=max_(watt_hours))
    .to(quarters)
)

(
    job.stream(readings)
    .key_by("district")
    .window(Hopping(timedelta(hours=1), every=QUARTER), name="district-hour")
    .aggregate(wh=sum_(watt_hours), most=top_n(2, by=watt_hours, of=lambda reading: reading["meter"]))
    .to(hours)
)
