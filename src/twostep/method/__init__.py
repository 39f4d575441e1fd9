"""The paper on tensors: flow, schedule, rollout, losses, the critic's heads.

Imports nothing of ours; no folder, recipe or file is known here.
"""
