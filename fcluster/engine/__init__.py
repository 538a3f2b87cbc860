"""Runs records through a job, without Kafka, RocksDB, threads or clocks. The worker is one of its shells."""
