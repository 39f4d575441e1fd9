"""A student in formats that others read: diffusers, LoRA, ComfyUI, torch.export; cards.

Needs no training run: a student's folder is enough.
"""
