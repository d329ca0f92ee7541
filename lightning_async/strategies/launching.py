"""How long both launchers wait for ranks that end."""

from __future__ import annotations

__all__ = ["END_TIMEOUT_S", "POLL_S"]

# The ranks end by themselves when one of them fails, at the latest by their exit guards, five seconds later.
END_TIMEOUT_S = 8.0
# Between two looks at whether they have.
POLL_S = 0.5
