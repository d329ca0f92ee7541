"""Channels between a worker and the holder."""
