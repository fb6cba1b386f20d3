"""Tables of ablations that papers published: every row is a change of a run's configuration."""
