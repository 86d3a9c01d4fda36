"""The room of the qcow2 driver.  No entry point names it until it can serve images."""
