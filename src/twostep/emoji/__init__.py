"""The embedded world: scenes with captions, their pictures, the inspector that reads them.

Knows no flow model; nothing here is needed for a model of your own.
"""
