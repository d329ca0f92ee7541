"""What a run leaves for its user: timeline, record, summary, verdict. Above `monitor.py`; below `strategy.py`."""
