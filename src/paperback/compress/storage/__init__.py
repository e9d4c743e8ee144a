"""Compressed layers as they are really stored, and the files that hold a compressed model.

A storage module (`PackedLinear`, `CodebookLinear`, `PackedEmbedding`, `SparseLinear`) stands in the place
of a dense layer; `save_model` writes a model with such layers, and `load_model` (for a transformers model
also ``from_pretrained``, after ``import paperback``) reads it.

A new kind of storage is a subclass of `StoredLayer` with the decorator `@storage_module`: a `kind`, a class
method `from_dense(layer, ...)`, `spec() -> dict` of JSON values, a class method `empty(spec)` that gives the
module back with any contents (also on the meta device), `dense() -> (out, in)`, and all that a file must hold
in buffers and parameters.
"""

from paperback.compress.storage.files import StoredModel, load_model, save_model
from paperback.compress.storage.module import (
    LayerForm,
    StoredLayer,
    build,
    is_storage,
    prepare,
    spec_of,
    storage_module,
    stored_layers,
    to_dense,
)
from paperback.compress.storage.packed import CodebookLinear, PackedEmbedding, PackedLinear, QuantizedLayer
from paperback.compress.storage.sparse import SparseLinear, pack_zeros

__all__ = [
    "CodebookLinear",
    "LayerForm",
    "PackedEmbedding",
    "PackedLinear",
    "QuantizedLayer",
    "SparseLinear",
    "StoredLayer",
    "StoredModel",
    "build",
    "is_storage",
    "load_model",
    "pack_zeros",
    "prepare",
    "save_model",
    "spec_of",
    "storage_module",
    "stored_layers",
    "to_dense",
]
