"""The forms that a cache can have in a decoder's graph: growing ones are captured, the others are made of them here."""
