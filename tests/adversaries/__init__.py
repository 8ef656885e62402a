"""Programs that are nearly an operator, drawn without end, and the property that fusing them changes no number."""
