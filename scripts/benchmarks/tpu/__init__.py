"""The parts of `scripts/bench tpu_program`."""
