"""Where the kernels run in these tests: compiled on the GPU if there is one, else interpreted on the CPU."""

from __future__ import annotations

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
