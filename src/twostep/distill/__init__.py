"""The training loop and what it needs: updates, batches, validation, checkpoints, sharding.

No loss is written here; losses are in `method`, their sum in `objectives`.
"""
