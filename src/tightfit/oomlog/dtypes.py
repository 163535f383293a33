"""Bytes of the elements of tensors."""

ELEMENT_BYTES = {
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "complex64": 8,
    "complex128": 16,
    "half": 2,
    "float": 4,
    "double": 8,
}
"""Bytes of one element by the dtype's name in PyTorch, and by those that TensorFlow prints: half, float, double."""
