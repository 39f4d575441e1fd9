"""A student in formats that others read: diffusers, servers, LoRA, ComfyUI, the hub.

Needs no training run: a student's folder is enough.
"""
