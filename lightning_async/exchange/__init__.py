"""Gradients to the holder and parameters back: workers, sessions, and what serves them."""
