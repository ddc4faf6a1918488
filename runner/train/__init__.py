"""Floor 4, in the worker: the training loop and what it reads from."""
