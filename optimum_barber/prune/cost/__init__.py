"""What a run needs in memory, on disk and in time."""
