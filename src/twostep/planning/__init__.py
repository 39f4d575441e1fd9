"""What a recipe or a model needs (memory, disk, operations), worked out on tensors of shapes alone.

Runs the project's own code, stage by stage, and loads no weights; few formulas that could drift.
"""
