"""The command ``xbd``."""
