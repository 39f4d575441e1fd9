"""Moved to `twostep.inference.pipeline`; importable from here for one release more."""

from twostep.inference.pipeline import TwoStepOutput, TwoStepPipeline

__all__ = ["TwoStepOutput", "TwoStepPipeline"]
