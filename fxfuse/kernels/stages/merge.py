"""How `merge` divides its work: the partial statistics of a value's channels, added up in pieces. Pure."""

from __future__ import annotations

#: its threads, the channels that a block of it takes, the slots that it reads at once, and blocks at most: two for
#: every multiprocessor of an H100, on other GPUs as well, so that sums are the same on all
MERGE_BLOCK, MERGED, MERGE_SLOTS, MERGE_BLOCKS = 256, 8, 256, 264


def pieces(samples: int, channels: int, slots: int) -> int:
    """Into how many pieces `merge` adds up the partial statistics of a sample's slots: enough to fill a GPU."""
    wanted = max(1, min(slots // MERGE_SLOTS, MERGE_BLOCKS // (samples * -(-channels // MERGED))))
    return -(-slots // -(-slots // wanted))  # without those behind the last slot
