"""The command line: LightningCLI with the asynchronous strategies, `compare` and `report`.

The top room: it imports the package, and nothing imports it.
"""
