"""Runs records through a stage of a job.

Responsible for: operators (one file each in `operators`); their compilation into one function for each shard
(`compile`, `runner`); the results of a record: outputs, state, a dead letter, or an error; the layers of a
shard's state (`state`) and its encoding (`values`); the format of an epoch's changes (`changelog`). It knows
no Kafka, RocksDB, threads or clocks: the worker is one of its shells. Everything in this folder is pure.
"""
