"""How much clients may have in flight, and what they have."""

from __future__ import annotations

import attrs
import trio

from xbd.core.units import KIB, MIB

REPLY_BYTES = 64 * KIB
"""What a request without data counts as: no such reply is longer."""


@attrs.frozen(kw_only=True)
class Limits:
    """For one export; bytes count from a request's arrival until its reply has left."""

    connections: int = 64
    negotiation_seconds: float = 30.0
    requests: int = 256
    """In flight on one connection."""
    connection_bytes: int = 16 * MIB
    """In flight on one connection."""
    export_bytes: int = 128 * MIB
    """In flight on all connections."""
    reserved_bytes: int = MIB
    """A connection with nothing in flight may have this, whatever the others have: who hoards
    slows the others down, and no more."""
    farewell_seconds: float = 30.0
    """How long a client that is done, or is told to go, may take to read its replies."""


@attrs.define
class Budget:
    """What all connections of one export have in flight."""

    limits: Limits
    bytes: int = 0
    given: int = 0
    """How often replies have left."""
    room: trio.lowlevel.ParkingLot = attrs.field(factory=trio.lowlevel.ParkingLot)
    """Where it is waited for replies to leave."""


@attrs.define
class Share:
    """What one connection has in flight."""

    budget: Budget
    requests: int = 0
    bytes: int = 0

    def take(self, size: int) -> bool:
        """Begin a request of `size` bytes; False: not now."""
        limits = self.budget.limits
        if self.requests:
            if self.requests >= limits.requests or self.bytes + size > limits.connection_bytes:
                return False
            reserved = 0
        else:
            reserved = limits.reserved_bytes
        others = self.budget.bytes
        if others and others + size > limits.export_bytes and size > reserved:
            return False
        self.requests += 1
        self.bytes += size
        self.budget.bytes += size
        return True

    def give(self, requests: int, size: int) -> None:
        """Replies have left."""
        self.requests -= requests
        self.bytes -= size
        self.budget.bytes -= size
        self.budget.given += 1
        if self.budget.room:
            self.budget.room.unpark_all()
