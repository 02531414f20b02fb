"""What people should rate, and what their ratings say."""
