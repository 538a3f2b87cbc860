"""Kafka: clients and their errors, topics and their ids, and the embedded broker."""
