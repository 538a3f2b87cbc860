"""Modules that every other folder may use, and that import none of them: errors, ids, settings, positions,
logs, files.
"""
