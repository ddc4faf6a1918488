"""The parts of `scripts/bench step`: models, contestants, child processes, rounds, table."""
