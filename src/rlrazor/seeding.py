"""Random streams: one for each purpose, so that what is drawn for one does not shift what is drawn for another."""

import hashlib


def seed_of(seed: int, purpose: str) -> int:
    """A 63-bit seed that depends on both arguments."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
