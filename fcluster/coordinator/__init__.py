"""The coordinator: assigns shards, triggers barriers, declares epochs complete."""
