"""Training on Ray Train: the schedule, the batches, the loops and their checkpoints."""
