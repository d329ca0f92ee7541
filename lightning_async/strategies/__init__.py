"""What Lightning sees of the package: strategies, launchers, collectives and checkpoints."""
