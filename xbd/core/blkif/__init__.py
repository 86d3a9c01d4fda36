"""The block interface, pure: layouts, rings, requests and states, without any I/O."""

from xbd.core.blkif.abi import ABIS, ARM, NATIVE, X86_32, X86_64, Abi, entries, pick_abi
from xbd.core.blkif.decode import Decoder, Limits
from xbd.core.blkif.requests import (
    Discard,
    Flush,
    Indirect,
    Rejected,
    Request,
    Single,
    Transfer,
    whole,
)
from xbd.core.blkif.ring import BackRing, FrontRing
from xbd.core.blkif.state import XenbusState

__all__ = [
    "ABIS",
    "ARM",
    "NATIVE",
    "X86_32",
    "X86_64",
    "Abi",
    "BackRing",
    "Decoder",
    "Discard",
    "Flush",
    "FrontRing",
    "Indirect",
    "Limits",
    "Rejected",
    "Request",
    "Single",
    "Transfer",
    "XenbusState",
    "entries",
    "pick_abi",
    "whole",
]
