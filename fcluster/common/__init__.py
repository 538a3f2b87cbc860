"""What everything may use, with nothing of ours below it: errors, ids, settings, positions, logs, files."""
