"""Reading the functions that flex_attention is given, and saying them as one Attention."""
