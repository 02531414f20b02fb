"""Training of a bi-encoder without Ray: texts by id, batches, losses, one step on any number of workers, the loop."""
