"""Studies and tables as pages of docs/."""
