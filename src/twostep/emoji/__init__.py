"""The embedded world: emoji scenes, their captions and the inspector that reads them."""
