"""All contact with Lightning's private API.

Lightning's public hooks cannot delimit the phases of an asynchronous epoch, so these modules subclass and call what has
no promise of staying. The package pins Lightning's minor version, and `tests/unit/test_canary.py` fails when a name
that is used here changes.
"""
