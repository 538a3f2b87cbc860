"""How often a process of the cluster looks for garbage that reference counts don't find."""

from __future__ import annotations

import gc


def settle() -> None:
    """Call it once, when everything exists that lives as long as the process. Examining that in each
    collection costs a worker 3 to 4%, and the coordinator of many workers a part of each epoch.
    """
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
