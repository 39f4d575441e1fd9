"""What a recipe needs, worked out before anything is loaded."""
