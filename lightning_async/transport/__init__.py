"""Channels between a worker and the holder. Imports no Lightning."""
