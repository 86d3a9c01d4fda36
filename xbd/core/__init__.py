"""The daemon's core: blkif, the boundaries, the data path, a device's life."""
