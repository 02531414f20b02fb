"""Texts that resemble each other, found without comparing all pairs."""
