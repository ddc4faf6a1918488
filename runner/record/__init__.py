"""Floor 1: what parent and child both know: events, outcomes, the run folder, errors."""
