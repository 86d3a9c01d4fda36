"""One device's life, and the supervisor of all devices."""
