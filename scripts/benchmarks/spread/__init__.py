"""The parts of `scripts/bench scaling`: what is measured of a job, and the process that does."""
