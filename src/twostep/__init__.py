"""Distil an 8-step text-to-image flow model into two steps."""
