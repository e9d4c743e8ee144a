"""int4 weights by torchao and by GGUF's Q4_0: bytes, codes, errors, and the time of a forward pass.

Runs in `.venv-peers-compress`, called by `benchmarks/compress/packed.py`. Reads a safetensors file of
float32 matrices and one of a square matrix with inputs; writes JSON to its output. torchao 0.18 has no int4
weights for the CPU among its stable formats ("Requires mslk" or "does not support device 'cpu' yet"), so
its prototype for the CPU is used, and for the codes the two functions that both call.
"""

import json
import os
import sys
import tempfile
import time

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from safetensors.torch import load_file
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from torchao.quantization import quantize_
from torchao.quantization.quant_primitives import (
    MappingType,
    _choose_qparams_affine_tinygemm,
    _quantize_affine_tinygemm,
)


def payload(module):
    """Bytes of the tensors that a layer's int4 weight consists of."""
    weight = module.weight
    return sum(
        getattr(weight, name).numel() * getattr(weight, name).element_size()
        for name in weight.tensor_data_names
    )


def torchao_layers(weights, size, dtype):
    """Linear layers with int4 weights."""
    layers = torch.nn.ModuleDict()
    for name, weight in weights.items():
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=dtype)
        layer.weight.data.copy_(weight)
        layers[name.replace(".", "-")] = layer
    quantize_(layers, PrototypeInt4WeightOnlyConfig(group_size=size))
    return layers


def codes(weight, size):
    """The codes that torchao's `from_hp` hands to the kernel's packing."""
    block = [1, size]
    scale, zero = _choose_qparams_affine_tinygemm(
        weight, MappingType.ASYMMETRIC, block, torch.int32, 0, 15, 1e-6, None, weight.dtype
    )
    return _quantize_affine_tinygemm(weight, block, scale, zero, torch.int32, 0, 15).to(torch.uint8)


def median_seconds(layer, x, runs=15):
    times = []
    with torch.no_grad():
        for i in range(runs + 5):
            start = time.perf_counter()
            layer(x)
            if i >= 5:
                times.append(time.perf_counter() - start)
    return float(np.median(times))


def main():
    torch.set_num_threads(1)
    weights, square, folder = load_file(sys.argv[1]), load_file(sys.argv[2]), sys.argv[3]
    result = {"torchao": {}, "seconds": {}}
    for size in (32, 128):
        for dtype in (torch.float32, torch.bfloat16):
            layers = torchao_layers(weights, size, dtype)
            with tempfile.NamedTemporaryFile() as file:
                torch.save(layers.state_dict(), file.name)
                saved = os.path.getsize(file.name)
            key = f"group {size}, {str(dtype)[6:]}"
            result["torchao"][key] = {"payload": sum(map(payload, layers.values())), "file": saved}
        torch.save(
            {name: codes(weight, size) for name, weight in weights.items()}, f"{folder}/codes-{size}.pt"
        )
    path = f"{folder}/q4_0.gguf"
    writer = GGUFWriter(path, "none")
    bytes_of_blocks, error = 0, 0.0
    for name, weight in weights.items():
        blocks = quants.quantize(weight.numpy(), GGMLQuantizationType.Q4_0)
        bytes_of_blocks += blocks.nbytes
        error += float(((quants.dequantize(blocks, GGMLQuantizationType.Q4_0) - weight.numpy()) ** 2).sum())
        writer.add_tensor(name, blocks, raw_dtype=GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    result["q4_0"] = {"payload": bytes_of_blocks, "file": os.path.getsize(path), "error": error}
    for rows in (1, 64):
        for dtype in (torch.float32, torch.bfloat16):
            layer = torchao_layers({"w": square["weight"]}, 32, dtype)["w"]
            x = square["x"][:rows].to(dtype)
            result["seconds"][f"{rows} {str(dtype)[6:]}"] = median_seconds(layer, x)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
