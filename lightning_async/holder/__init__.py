"""Parameters, optimizer state, version and the staleness bound: pure of I/O and of Lightning."""
