"""Layers as checkpoints of Hugging Face have them, and as their libraries compute them without a CUDA kernel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

K, N, G = 128, 64, 32
"""Inputs, outputs, and how many inputs share a scale."""


class Format(nn.Module):
    """Random integers, zero points and scales; `pack` keeps them, `weight` [K, N] reads them."""

    low, bits, act_order = 0, 4, 0

    def __init__(self, dtype: torch.dtype = torch.float32, **options: int) -> None:
        super().__init__()
        for name, value in options.items():
            setattr(self, name, value)
        generator = torch.Generator().manual_seed(len(options))
        high = self.low + (1 << self.bits)
        self.integers = torch.randint(self.low, high, (K, N), generator=generator)
        self.zeros = torch.randint(self.low + 1, high, (K // G, N), generator=generator)
        self.groups = torch.arange(K) // G
        if self.act_order:
            self.groups = self.groups[torch.randperm(K, generator=generator)]
        self.register_buffer("scales", (torch.rand(K // G, N, generator=generator) * 0.1 + 0.01).to(dtype))
        self.pack()

    def pack(self) -> None:
        raise NotImplementedError

    def weight(self) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight()

    def expected(self) -> Tensor:
        return (self.integers - self.zeros[self.groups]) * self.scales[self.groups]


class GPTQ(Format):
    """`QuantLinear.forward` of auto_gptq/nn_modules/qlinear/qlinear_cuda.py, and of GPTQModel's torch backend:
    https://github.com/AutoGPTQ/AutoGPTQ. Words run down a column of `qweight`, along a row of `qzeros`; zero points are
    kept one less (`plus`), and `g_idx` says which group an input belongs to.
    """

    plus = 1

    def pack(self) -> None:
        shifts, count = torch.arange(0, 32, self.bits), 32 // self.bits
        rows = self.integers.view(K // count, count, N) << shifts[:, None]
        columns = (self.zeros - self.plus).view(K // G, N // count, count) << shifts
        self.register_buffer("qweight", rows.sum(1).to(torch.int32))
        self.register_buffer("qzeros", columns.sum(2).to(torch.int32))
        self.register_buffer("g_idx", self.groups.to(torch.int32))
        self.wf = shifts.to(torch.int32)[None]

    def weight(self) -> Tensor:
        bits, kind = self.bits, torch.int16 if self.bits == 8 else torch.int8
        zeros = torch.bitwise_right_shift(
            torch.unsqueeze(self.qzeros, 2).expand(-1, -1, 32 // bits), self.wf.unsqueeze(0)
        ).to(kind)
        zeros = torch.bitwise_and(zeros, (2**bits) - 1)
        if self.plus:
            zeros = zeros + 1
        zeros = zeros.reshape(self.scales.shape)
        weight = torch.bitwise_right_shift(
            torch.unsqueeze(self.qweight, 1).expand(-1, 32 // bits, -1), self.wf.unsqueeze(-1)
        ).to(kind)
        weight = torch.bitwise_and(weight, (2**bits) - 1)
        weight = weight.reshape(weight.shape[0] * weight.shape[1], weight.shape[2])
        index = self.g_idx.long()
        return self.scales[index] * (weight - zeros[index])


class Repeated(GPTQ):
    """AutoRound's: without `g_idx`."""

    def weight(self) -> Tensor:
        shifts = self.wf.squeeze(0)
        zeros = ((self.qzeros[:, :, None] >> shifts).to(torch.int8) & 15).reshape(self.scales.shape) + 1
        weight = ((self.qweight[:, None] >> shifts[:, None]).to(torch.int8) & 15).reshape(K, N)
        return self.scales.repeat_interleave(G, dim=0) * (weight - zeros.repeat_interleave(G, dim=0))


class AWQ(Format):
    """`dequantize_gemm` of awq/utils/packing_utils.py: https://github.com/casper-hansen/AutoAWQ. Words run along rows,
    and the eight columns of a word stand in the order 0, 2, 4, 6, 1, 3, 5, 7.
    """

    def pack(self) -> None:
        order, shifts = [0, 2, 4, 6, 1, 3, 5, 7], torch.arange(0, 32, 4)
        for name, values in (("qweight", self.integers), ("qzeros", self.zeros)):
            words = (values.view(-1, N // 8, 8)[:, :, order] << shifts).sum(2)
            self.register_buffer(name, words.to(torch.int32))

    def weight(self) -> Tensor:
        shifts = torch.arange(0, 32, 4)
        iweights = torch.bitwise_right_shift(self.qweight[:, :, None], shifts[None, None, :]).to(torch.int8)
        iweights = iweights.view(iweights.shape[0], -1)
        izeros = torch.bitwise_right_shift(self.qzeros[:, :, None], shifts[None, None, :]).to(torch.int8)
        izeros = izeros.view(izeros.shape[0], -1)
        reverse = torch.arange(izeros.shape[-1], dtype=torch.int32).view(-1, 8)
        reverse = reverse[:, [0, 4, 1, 5, 2, 6, 3, 7]].view(-1)
        iweights = torch.bitwise_and(iweights[:, reverse], 15)
        izeros = torch.bitwise_and(izeros[:, reverse], 15)
        return (iweights - izeros.repeat_interleave(G, dim=0)) * self.scales.repeat_interleave(G, dim=0)


class CompressedTensors(Format):
    """`unpack_from_int32` and `dequantize` of compressed-tensors 0.20, format pack-quantized:
    https://github.com/vllm-project/compressed-tensors. [outputs, inputs], words along a row, 8 added to integers from
    -8 to 7; words of zero points, where there are some, run down a column.
    """

    low, symmetric = -8, 0

    def pack(self) -> None:
        shifts = torch.arange(0, 32, 4)
        rows = ((self.integers.t() + 8).reshape(N, K // 8, 8) << shifts).sum(2)
        columns = ((self.zeros.t() + 8).reshape(N // 8, 8, K // G) << shifts[:, None]).sum(1)
        self.register_buffer("weight_packed", rows.to(torch.int32))
        if self.symmetric:
            self.zeros = torch.zeros_like(self.zeros)
        else:
            self.register_buffer("weight_zero_point", columns.to(torch.int32))
        self.register_buffer("weight_scale", self.scales.t().contiguous())

    @staticmethod
    def unpacked(words: Tensor, columns: int, packed_dim: int) -> Tensor:
        words = words.transpose(0, 1) if packed_dim == 0 else words
        nibbles = words.contiguous().view(torch.uint8)
        output = torch.stack((nibbles & 0xF, nibbles >> 4), dim=-1)
        output = output.view(torch.int8).view(words.shape[0], -1)[:, :columns] - 8
        return output.transpose(0, 1) if packed_dim == 0 else output

    def weight(self) -> Tensor:
        weight = self.unpacked(self.weight_packed, K, 1).unflatten(1, (K // G, G)).to(self.scales.dtype)
        if not self.symmetric:
            zeros = self.unpacked(self.weight_zero_point, N, 0)
            weight = weight - zeros.unsqueeze(-1).to(weight.dtype)
        return (weight * self.weight_scale.unsqueeze(-1)).flatten(1).t()


FORMATS: dict[str, tuple[Format, str]] = {
    "GPTQ": (GPTQ(), "UINT4"),
    "GPTQ, 2 bits": (GPTQ(bits=2), "INT4"),
    "GPTQ, 8 bits": (GPTQ(bits=8), "UINT8"),
    "GPTQ, act-order": (GPTQ(act_order=1), "UINT4"),
    "GPTQ v2": (GPTQ(plus=0), "UINT4"),
    "AutoRound": (Repeated(), "UINT4"),
    "AWQ": (AWQ(), "UINT4"),
    "compressed-tensors": (CompressedTensors(), "INT4"),
    "compressed-tensors, symmetric": (CompressedTensors(symmetric=1), "INT4"),
}
"""By name: a layer, and ONNX's type for what it keeps."""
