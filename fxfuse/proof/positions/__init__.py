"""What a program computes from positions and sizes: read element by element, and decided for all sizes."""
