"""The control socket: how ``xbd list`` and its like ask a running daemon."""
