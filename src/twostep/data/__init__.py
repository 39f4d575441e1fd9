"""What a distillation is given: prompts, real images, the cache of the teacher's images.

Nothing that learns; order and noise of the turns are in `distill`.
"""
