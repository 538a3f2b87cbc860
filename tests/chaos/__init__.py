"""Faults on real processes under load; see `runner`."""
