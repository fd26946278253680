"""Random numbers that no library version changes: raw bits of Philox4x64.

Each use has a generator of its own, keyed by a hash of the seed and of what it is used for, and any of its numbers is
reached at once. Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def philox(seed: int, *keys: object) -> np.random.Philox:
    """A generator of its own for each seed and keys: 128 bits of a hash are Philox's key."""
    text = ":".join(map(str, (seed, *keys)))
    key = np.frombuffer(hashlib.sha256(text.encode()).digest()[:16], dtype="<u8")
    return np.random.Philox(key=key)


def permutation(length: int, seed: int, *keys: object) -> NDArray[np.uint64]:
    """A permutation of its own for each seed and keys.

    A number's place goes into the low bits of its random ones, which leaves 42 of those even for four million, and
    what a sort of the whole has left there is the stable argsort of the rest.
    """
    low = np.uint64((1 << max(length - 1, 1).bit_length()) - 1)
    bits: NDArray[np.uint64] = philox(seed, *keys).random_raw(length)
    bits &= ~low
    bits |= np.arange(length, dtype=np.uint64)
    bits.sort()
    bits &= low
    return bits


class SampleUniforms:
    """All that is random about a sample in an epoch, its text and its crop: `count` numbers in [0, 1).

    They are a stretch of the epoch's Philox stream that belongs to the sample alone.
    """

    def __init__(self, seed: int, count: int) -> None:
        self._seed, self._count, self._blocks = seed, count, -(-count // 4)  # Philox4x64 makes four numbers at a time
        self._streams: dict[int, tuple[np.random.Philox, int]] = {}

    def __call__(self, epochs: Sequence[int], samples: Sequence[int]) -> NDArray[np.float64]:
        """(N, count) numbers of N samples, each in its epoch."""
        bits_NK = np.empty((len(samples), self._count), np.uint64)
        for row, (epoch, sample) in enumerate(zip(epochs, samples, strict=True)):
            if epoch not in self._streams:
                self._streams = {epoch: (philox(self._seed, "sample", epoch), 0), **self._streams}
                self._streams = dict(itertools.islice(self._streams.items(), 4))
            stream, at = self._streams[epoch]
            stream.advance((sample * self._blocks - at) % (1 << 256))
            bits_NK[row] = stream.random_raw(self._count)
            self._streams[epoch] = stream, (sample + 1) * self._blocks
        return (bits_NK >> np.uint64(11)).astype(np.float64) * 2.0**-53
