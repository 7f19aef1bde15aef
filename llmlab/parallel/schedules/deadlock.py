"""Naming a circle of ranks that wait for each other."""

from __future__ import annotations

from collections.abc import Mapping


def waiting(waits: Mapping[int, tuple[int, str]]) -> str:
    """Who waits for whom on what, in words.

    waits: for each rank that cannot go on, the rank that it waits for, and what that one would have to do. They lead
    from the lowest rank to a circle, and only this is told; or else to a rank that has ended: then the way there is.
    """
    path: list[int] = []
    rank = min(waits)
    while rank in waits and rank not in path:
        path.append(rank)
        rank = waits[rank][0]
    circle = path[path.index(rank) :] if rank in path else path
    told = []
    for waiter in circle:
        peer, what = waits[waiter]
        told.append(f"rank {waiter} waits for {'itself' if peer == waiter else f'rank {peer}'} to {what}")
    return "; ".join(told) + ("" if rank in path else f"; but rank {rank} has ended")
