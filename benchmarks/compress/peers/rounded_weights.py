"""Matrices rounded by torchao's primitives; called by `benchmarks/compress/distill_quantize.py`.

Arguments: a safetensors file of float32 matrices, the output, bits. Prints the bytes of codes and scales.
"""

import sys

import torch
from safetensors.torch import load_file, save_file
from torchao.quantization.quant_primitives import (
    MappingType,
    choose_qparams_affine,
    dequantize_affine,
    quantize_affine,
)


def main():
    bits, result, size = int(sys.argv[3]), {}, 0
    for name, weight in load_file(sys.argv[1]).items():
        width = weight.shape[1] if bits == 8 or weight.shape[1] % 32 else 32
        block, top = (1, width), 2**bits - 1
        scale, zero = choose_qparams_affine(weight, MappingType.ASYMMETRIC, block, torch.uint8, 0, top)
        codes = quantize_affine(weight, block, scale, zero, torch.uint8, 0, top)
        result[name] = dequantize_affine(codes, block, scale, zero, torch.uint8, 0, top)
        size += codes.numel() * bits // 8 + scale.numel() * 4 + zero.numel() * bits // 8
    save_file(result, sys.argv[2])
    print(size)


if __name__ == "__main__":
    main()
