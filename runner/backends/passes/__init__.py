"""What is done to a traced step between the user's code and XLA's compiler: one pass a file."""
