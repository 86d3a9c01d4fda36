"""xbd: a Xen block backend in user space."""

__version__ = "0.1.0"
