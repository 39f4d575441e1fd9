"""What a recipe or a model needs (memory, disk, operations), worked out on fake tensors.

Runs the trainer's own turns and loads no weights; holds no formula that could drift.
"""
