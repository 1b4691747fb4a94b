"""The cryptographic generator behind every private draw: cohorts and noise.

ChaCha20 (RFC 8439) as a stream of random bits, keyed from the operating system's generator. A seed fixes the key, for
simulations and tests only: with a known seed the noise can be subtracted, so whoever takes a seed from settings must
refuse it in a deployment (`stillroom_server.coordinate` does) and `Randomness.seeded` stays visible in every statement.
"""

from __future__ import annotations

import hashlib
import secrets

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray

_BLOCK_BYTES = 256  # small: every draw shifts the pool, a big integer


class Randomness:
    """A stream of independent fair bits; not thread-safe. No bit is handed out twice, whichever method takes it.

    >>> Randomness(seed="toy").bits(16) == Randomness(seed="toy").bits(16)
    True
    >>> Randomness(seed="toy").seeded, Randomness().seeded
    (True, False)
    """

    def __init__(self, *, seed: str | None = None) -> None:
        self.seeded = seed is not None
        key = (
            secrets.token_bytes(32)
            if seed is None
            else hashlib.sha256(f"stillroom randomness {seed}".encode()).digest()
        )
        self._cipher = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()
        self._pool = 0
        self._pool_bits = 0

    def bits(self, count: int) -> int:
        """A uniform integer in [0, 2**count)."""
        while self._pool_bits < count:
            block = self._cipher.update(bytes(_BLOCK_BYTES))
            self._pool |= int.from_bytes(block, "little") << self._pool_bits
            self._pool_bits += 8 * len(block)
        taken = self._pool & ((1 << count) - 1)
        self._pool >>= count
        self._pool_bits -= count
        return taken

    def words(self, count: int) -> NDArray[np.uint64]:
        """Uniform integers of 64 bits, (count,), read as little-endian on every machine.

        They come from the cipher where it stands; what `bits` has left of its last block stays for `bits`.

        >>> [hex(word) for word in Randomness(seed="toy").words(2).tolist()]
        ['0xb3dbb98a3bafebd9', '0x30e87e8959b7fef5']
        """
        return np.frombuffer(self._cipher.update(bytes(8 * count)), "<u8").astype(np.uint64, copy=False)

    def below(self, bound: int) -> int:
        """A uniform integer in [0, bound), by rejection: exactly uniform."""
        width = bound.bit_length()
        while (value := self.bits(width)) >= bound:
            pass
        return value

    def bernoulli(self, numerator: int, denominator: int) -> bool:
        """True with probability exactly numerator / denominator."""
        return self.below(denominator) < numerator
