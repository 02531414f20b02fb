"""DAGR-Ray: turn a pile of documents into a better retriever, and learn what it cost."""

__version__ = "0.1.0"
