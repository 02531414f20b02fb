"""Training of a bi-encoder, independent of Ray: texts by number, batches, one step on any number of workers, the loop."""
