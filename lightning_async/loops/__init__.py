"""Lightning's loops, hooks and metrics in phases: all contact with private Lightning API but the launchers'.

Lightning's public hooks cannot delimit the phases of an asynchronous epoch, so these modules subclass and call what has
no promise of staying. The package pins Lightning's minor version, and the canary test fails when a name that is used
here changes.
"""
