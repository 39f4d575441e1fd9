"""Making pictures: sampler, diffusers pipeline, files of pictures, sheets side by side.

Nothing that trains, measures or reads a recipe.
"""
