"""Compares xbd with QEMU on one machine, in one run."""
