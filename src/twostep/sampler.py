"""Moved to `twostep.inference.sampler`; importable from here for one release more."""

from twostep.inference.sampler import Sample, Sampler

__all__ = ["Sample", "Sampler"]
