"""Model cards: scripts that run a student elsewhere, what it was made of, how close it comes.

Text, and the pictures it shows: no network is loaded and the hub is not asked.
"""
