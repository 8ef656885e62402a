"""Runs decoders and writes text: a session owns the cache, in ONNX Runtime (`Session`) or eager PyTorch
(`EagerSession`).

session = fxfuse.runtime.Session("llama-onnx/")           # or EagerSession(model): the same interface
for text in fxfuse.runtime.stream(session, tokenizer, "Once upon", max_new_tokens=64):
    print(text, end="")

Needs ``pip install 'fxfuse[ort]'``.
"""

from fxfuse.runtime.eager import EagerSession
from fxfuse.runtime.generate import Decoder, generate, stream
from fxfuse.runtime.session import Session

__all__ = ["Decoder", "EagerSession", "Session", "generate", "stream"]
