"""The exactly-once checker: decides from what stands in Kafka whether a job's output is what it must be.

`records` says what a test record and a job's output look like, `verdict` (pure) compares, `generate` writes
input, `reading` reads both sides back, `live` is a reader that runs beside the job, `check` puts them
together. `python -m tests.checker --help` does it by hand.
"""
