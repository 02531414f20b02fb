"""How fast: beside the peer that does the same work, in turns, on one machine."""
