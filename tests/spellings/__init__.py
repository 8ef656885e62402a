"""Equal spellings of one meaning, and near misses that only look like it."""
