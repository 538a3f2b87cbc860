"""Scripts that measure what the README claims. Each prints its figures next to a yardstick from the same
run.
"""
