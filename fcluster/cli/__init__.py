"""The command `fcluster`: parsing, start-up, the live view, and the operators' commands."""
