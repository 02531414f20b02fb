"""What is left after faults: killed processes, cut networks, damaged files."""
