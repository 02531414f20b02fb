"""Encoders, vectors, exact search and fusion, independent of Ray."""
