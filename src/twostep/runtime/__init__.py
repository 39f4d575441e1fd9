"""The machine: files, processes, devices, memory, provenance, random streams, images on disk.

No model and no recipe is known here.
"""
