"""The self-contained page of an evaluation or a run: words, curves, HTML.

Reads plain records; computes no metric.
"""
