"""Shards that are needed soon arrive before they are: fetched, hashed, indexed by threads of a loader process."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

from data_prep.record import DataError
from pipeline.data.store import ShardStore

log = logging.getLogger(__name__)


class Ahead:
    """Lets shards arrive in the background, in the order in which they are wanted.

    A shard that cannot be had is left to whoever needs it, who will say so.

    Args:
        store: of the shards.
        threads: shards that arrive at a time.
    """

    def __init__(self, store: ShardStore, threads: int) -> None:
        self._store, self._threads = store, threads
        self._settled = set[int]()
        self._wanted: list[int] = []
        self._changed = threading.Condition()
        self._started = False

    def want(self, shards: Sequence[int]) -> None:
        """From now on let these arrive, soonest first, and none that were wanted before."""
        with self._changed:
            self._settled &= set(shards)  # what was let go may have been evicted when it is wanted again
            self._wanted = [shard for shard in shards if shard not in self._settled]
            self._changed.notify_all()
        if not self._started:
            self._started = True
            for _ in range(self._threads):
                threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted)
                shard = self._wanted.pop(0)
                self._settled.add(shard)
            try:
                self._store.arrive(shard)
            except (DataError, OSError) as error:
                log.warning("%s did not arrive ahead of time: %s", self._store.name(shard), error)
