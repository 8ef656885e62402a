"""Real decoders of the transformers library, tiny and with random weights."""
