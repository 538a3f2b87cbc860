"""The commands, one module for each group of them.

Responsible for: parsing only. `--help` imports nothing heavy, so the modules that do the work are imported
inside the commands.
"""
