"""The exactly-once checker: decides from the contents of Kafka whether a job's output is what it must be.

`records` defines a test record and a job's output, `verdict` (pure) compares, `generate` writes input,
`reading` reads both sides back, `live` is a reader that runs next to the job, and `check` puts them together.
`python -m tests.checker --help` shows how to use it by hand.
"""
