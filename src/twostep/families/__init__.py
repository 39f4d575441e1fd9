"""What a family of models is, and one file for each: its network as a velocity, prompts, latents.

A family knows its network's classes and configuration keys, not folders, roles or training.
"""

from twostep.families.family import Family
from twostep.families.zimage import ZImage

# By the class name in the transformer's config.json.
FAMILIES: dict[str, Family] = {family.transformer: family for family in (ZImage(),)}
