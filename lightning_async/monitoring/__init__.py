"""What a run shows of itself: statistics, metrics, records, timelines, the diagnosis and the report."""
