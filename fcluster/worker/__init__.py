"""The worker: processes records, keeps keyed state, commits one Kafka transaction an epoch."""
