"""The real cores of coordinator and workers on a virtual clock, against a model of Kafka and of the disks.

`run` is the entrance, `docs/simulation.md` the guide. `python -m tests.simulation --seed 7 --verbose` shows
one run.
"""
