"""The local models and the documentation corpus of the quick start."""
