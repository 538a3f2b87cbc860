"""Every flight that left New York in 2013: running totals and delays for each carrier and each aircraft.

    fcluster up examples/flights/flights.py

The topic `flights` is keyed by carrier, so carriers are counted where the records arrive. Aircraft are
counted after a repartition by tail number. Each flight leads to one line for each of the two.
"""

from fcluster import Job

job = Job("flights-job")

flights = job.topic("flights", value="json")
carrier_totals = job.topic("carrier-totals", value="json")
aircraft_totals = job.topic("aircraft-totals", value="json")


@job.process(flights, to=carrier_totals)
def carrier(ctx, flight):
    totals = ctx.state
    totals["flights"] = totals.get("flights", 0) + 1
    if flight["dep_delay"] is None:
        totals["cancelled"] = totals.get("cancelled", 0) + 1
    else:
        totals["departure_delay"] = totals.get("departure_delay", 0) + flight["dep_delay"]
    if flight["arr_delay"] is not None:
        totals["arrived"] = totals.get("arrived", 0) + 1
        totals["arrival_delay"] = totals.get("arrival_delay", 0) + flight["arr_delay"]
        totals["worst_delay"] = max(totals.get("worst_delay", flight["arr_delay"]), flight["arr_delay"])
    return {"carrier": ctx.key, **totals}


def aircraft(ctx, flight):
    totals = ctx.state
    totals["flights"] = totals.get("flights", 0) + 1
    totals["miles"] = totals.get("miles", 0) + flight["distance"]
    totals["minutes"] = totals.get("minutes", 0) + (flight["air_time"] or 0)
    carriers = totals.setdefault("carriers", {})
    carriers[flight["carrier"]] = carriers.get(flight["carrier"], 0) + 1
    return {"tailnum": ctx.key, **totals}


(
    job.stream(flights)
    .filter(lambda flight: flight["tailnum"] is not None)
    .key_by("tailnum")
    .process(aircraft, to=aircraft_totals)
)
