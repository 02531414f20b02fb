"""Finds similar texts without comparing all pairs."""
