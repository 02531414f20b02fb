"""What grows with the data: memory, idle workers, and what a billion passages would take."""
