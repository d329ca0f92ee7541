"""Who takes part in a run, and how one failure becomes everyone's end."""
