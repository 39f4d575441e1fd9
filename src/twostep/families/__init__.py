"""What a family of models is, and one file for each: batched velocity, prompts, latents.

A family knows its network and its text encoder, not folders, roles or training.
"""
