"""A job for tests of calls: asks a service for the double of each number, then counts the answers by key.

The service is a TCP server on `FCLUSTER_TEST_PORT`. A request is a line with the key, the idempotency key and
the number; the answer is a line with the double. A connection that ends without an answer is a failure.
"""

import asyncio
import os
from datetime import timedelta

from fcluster import Circuit, Job, Retry

job = Job(os.environ["FCLUSTER_TEST_JOB"])
source = job.topic(os.environ["FCLUSTER_TEST_SOURCE"])
output = job.topic(os.environ["FCLUSTER_TEST_OUTPUT"])
port = int(os.environ["FCLUSTER_TEST_PORT"])


async def double(call, number):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"{call.key} {call.idempotency_key} {number}\n".encode())
        answer = await reader.readline()
        if not answer:
            raise ConnectionError("the service hung up")
        return int(answer)
    finally:
        writer.close()


def count(ctx, doubled):
    ctx.state["n"] = ctx.state.get("n", 0) + 1
    return {"key": ctx.key, "n": ctx.state["n"], "doubled": doubled}


(
    job.stream(source)
    .map_async(
        double,
        concurrency=50,
        timeout=timedelta(seconds=20),
        retry=Retry(attempts=20, on=(ConnectionError, TimeoutError), backoff=timedelta(milliseconds=20)),
        circuit=Circuit(failures=60, open_for=timedelta(milliseconds=300)),
    )
    .process(count, to=output)
)
