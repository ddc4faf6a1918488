"""The parts of `scripts/bench tpu_program` and `scripts/bench verdict`."""
