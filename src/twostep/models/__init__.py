"""Opening model folders, the same for all families: locate, velocity, adapters, codec, 8 bits.

Nothing that samples, trains or reads a recipe.
"""
