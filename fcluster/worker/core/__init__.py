"""The worker's decisions: sessions, shards, epochs, departure. Pure: events in, effects out."""
