"""One adapter per model family: batched velocity, prompt encoding, decoding."""
