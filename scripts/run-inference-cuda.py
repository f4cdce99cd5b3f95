"""Eagle 7B on a CUDA GPU of 24 GB, as in the article: python scripts/run-inference-cuda.py [MODEL.pth] [--strategy …]

The switches are those of the `rwkv` package, which does split, streamed and 8-bit strategies. RWKV_CUDA_ON=1 compiles
its CUDA kernels (prompts up to ten times faster; needs nvcc, a C++ compiler and ninja).
"""

import os

os.environ.setdefault("RWKV_JIT_ON", "1")
os.environ.setdefault("RWKV_CUDA_ON", "0")

import sys

from rwkv_nb.inference.demo import main

if __name__ == "__main__":
    sys.exit(main("cuda fp16"))
