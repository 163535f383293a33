"""PyTorch's caching allocator, block for block."""
