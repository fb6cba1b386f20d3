"""What a run needs of hardware that is not here: memory, communication, time."""
