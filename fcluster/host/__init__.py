"""The processes of a job on one host: the supervisor, agents, the data directory."""
