"""Floor 4, in the parent: child processes and what becomes of them."""
