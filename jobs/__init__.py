"""Jobs: a model, its data and its loss, each in a short file to copy from."""
