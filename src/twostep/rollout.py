"""Moved to `twostep.method.rollout`; importable from here for one release more."""

from twostep.method.rollout import Rollout, euler, seeded_noise, two_step

__all__ = ["Rollout", "euler", "seeded_noise", "two_step"]
