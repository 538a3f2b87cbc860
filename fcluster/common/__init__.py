"""What both sides speak: messages, transport, settings, errors, the job model, Kafka clients."""
