"""Checkpoints of transformers: what a folder holds, its weights checked, and sample inputs of encoders."""

from fxfuse.pretrained.dtypes import check_dtype, dtype_for_cpu
from fxfuse.pretrained.holds import Holds, look
from fxfuse.pretrained.inputs import Sample, output_names, sample_of
from fxfuse.pretrained.load import load

__all__ = ["Holds", "Sample", "check_dtype", "dtype_for_cpu", "load", "look", "output_names", "sample_of"]
