"""The training recipe: config, state, step, loop, checkpoints and metrics."""
