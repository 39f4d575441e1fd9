"""Comparing models: image sets, features, metrics, scorers, figures with intervals.

Knows no training; takes folders and images, gives numbers.
"""
