"""How good: filters, the leak gate, evaluation and estimates beside what is known."""
