"""Runs the command line as `python -m lightning_async`."""

from lightning_async.cli import main

if __name__ == "__main__":
    main()
