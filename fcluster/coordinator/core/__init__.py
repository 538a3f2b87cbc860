"""The coordinator's decisions: sessions, shards, epochs, the job's end. Pure: events in, effects out."""
