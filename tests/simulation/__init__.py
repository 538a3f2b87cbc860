"""The real cores of coordinator and workers with a virtual clock, on a model of Kafka and of the disks.

Start reading at `run`; `docs/simulation.md` is the guide. `python -m tests.simulation --seed 7 --verbose`
shows one run.
"""
