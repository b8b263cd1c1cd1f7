"""The training: the objective on one page, the trainer around it, its arguments and its checkpoints."""
