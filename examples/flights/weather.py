"""Each flight with the weather at its airport at the time for which it was scheduled.

Both topics are keyed by airport. The weather is a table, of which each flight meets the row of its own time:
the newest observation that isn't later than the flight.

    python examples/flights/load.py --brokers HOST:PORT --by-time
    fcluster up examples/flights/weather.py
"""

from fcluster import Job

job = Job("flights-weather")
schedule = job.topic("schedule", timestamp="scheduled")
weather = job.table(job.topic("weather"))
flights_weather = job.topic("flights-weather")


def with_weather(flight, observed):
    """A flight's delay, and what may explain it. `observed` is None before the first observation."""
    return {
        "flight": f"{flight['carrier']}{flight['flight']}",
        "origin": flight["origin"],
        "scheduled": flight["scheduled"],
        "dep_delay": flight["dep_delay"],
        "observed": observed and observed["observed"],
        "wind_speed": observed and observed["wind_speed"],
        "visib": observed and observed["visib"],
    }


job.stream(schedule).join(weather, with_weather, how="left").to(flights_weather)
