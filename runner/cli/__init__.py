"""Floor 5, parent's side: the command line. Nothing here imports torch."""
