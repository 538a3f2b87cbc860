"""The command `fcluster`: parsing, start-up, the live view, and what operators do."""
