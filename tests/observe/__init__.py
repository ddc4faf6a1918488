"""Tests of `runner.observe`."""
