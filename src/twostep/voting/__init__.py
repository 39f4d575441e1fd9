"""Judging by people: two pictures of a prompt, whose they are hidden; votes, win rates, a page.

Shows what an evaluation left on disk; runs no model, and says nobody's name before the end.
"""
