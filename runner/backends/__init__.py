"""Floor 3: how a training step becomes a program."""
