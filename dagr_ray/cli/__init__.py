"""The ``dagr`` command."""
