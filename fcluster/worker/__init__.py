"""The worker: processes records, keeps keyed state, and commits one Kafka transaction for each epoch."""
