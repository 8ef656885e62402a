"""Other libraries: their models, their exporters, their commands."""
