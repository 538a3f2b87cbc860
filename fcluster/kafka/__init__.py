"""Kafka: clients, what goes wrong with them, topics and their ids, and the embedded broker."""
