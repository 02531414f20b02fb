"""Encoders, vectors, exact search and fusion. No Ray here."""
