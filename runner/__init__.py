"""A batch job runner for TPU training in PyTorch: `python -m runner job=resnet`."""

__version__ = "0.1.0"
