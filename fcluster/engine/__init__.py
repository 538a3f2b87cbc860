"""Runs records through a stage of a job.

Responsible for: operators (a file each in `operators`), their compilation into one function for each shard
(`compile`, `runner`), and what a record leads to: outputs, state, a dead letter, or an error; the layers of
a shard's state (`state`), its encoding (`values`), and the format in which an epoch's changes are kept
(`changelog`). It knows no Kafka, RocksDB, threads or clocks: the worker is one of its shells. Everything in
this folder is pure.
"""
