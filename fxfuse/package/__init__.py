"""Folders that generate text: what is in one (`manifest`), how it is written (`write`, `weights`), and what
onnxruntime-genai wants in it (`genai`)."""
