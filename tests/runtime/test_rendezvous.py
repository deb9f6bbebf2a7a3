"""Bug: after a restart a rank met the address of a dead one in torchrun's store and could not connect.

Fix: the processes of a start agree on a fresh name and use only keys below it.
Strategy: leave every key of dead starts in one store and let new starts meet, slow ranks and all.
"""

import threading
import time

import pytest
import torch.distributed as dist

from longctx.runtime.rendezvous import name_this_start


def start(store: dist.Store, world: int, delays: dict[int, float]) -> list[str]:
    names = [""] * world

    def process(rank: int) -> None:
        time.sleep(delays.get(rank, 0.0))
        names[rank] = name_this_start(store, rank, world, 10)

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return names


def test_every_start_in_one_store_has_one_name_of_its_own() -> None:
    store = dist.HashStore()
    starts = [start(store, 3, delays) for delays in ({}, {0: 0.2}, {1: 0.2}, {2: 0.2}, {0: 0.1, 2: 0.3})]
    assert all(len(set(names)) == 1 for names in starts)
    assert len({names[0] for names in starts}) == len(starts)


def test_what_a_start_that_died_half_way_left_is_ignored() -> None:
    store = dist.HashStore()
    store.set("longctx/start/hello/1", "dead")
    store.set("longctx/start/welcome/1", "dead gone")
    store.set("longctx/start/gone/ack/1", "")
    names = start(store, 2, {1: 0.2})
    assert names[0] == names[1] != "gone"


def test_a_missing_rank_is_named() -> None:
    with pytest.raises(TimeoutError, match="rank 1 did not show up"):
        name_this_start(dist.HashStore(), 0, 2, 0.1)
    with pytest.raises(TimeoutError, match="rank 0 did not answer rank 1"):
        name_this_start(dist.HashStore(), 1, 2, 0.1)
