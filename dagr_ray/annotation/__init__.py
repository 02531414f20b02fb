"""Human annotation: selects pairs to rate, and compares the ratings with teachers."""
