"""What Lightning sees of the package: strategies, launchers, collectives and checkpoints.

Below `cli` and `callbacks`; it puts `loops` in place and drives an `exchange`.
"""
