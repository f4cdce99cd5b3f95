"""The RWKV-5.2 language model: its sizes, its equations, its first weights (notebook 06)."""
