"""A holder in several processes: each has a part of the flat vector, and one gives every gradient its place.

`SequencingHolder`, in rank 0's process, is the `Holder` that sessions know; followers repeat what it decides.
"""
