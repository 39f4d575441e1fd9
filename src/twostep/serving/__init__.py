"""A server for models: an engine that batches between the steps, an OpenAI-style API, a page.

The engine knows no web framework and the application no torch; nothing that trains or measures.
"""
