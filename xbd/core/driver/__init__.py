"""Public for driver authors: everything a storage driver needs."""
