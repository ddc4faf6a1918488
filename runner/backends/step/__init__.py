"""The whole training step as one functional graph: tracing it, and making it smaller."""
