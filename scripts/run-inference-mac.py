"""Eagle 7B on a processor with 40 GB of memory, as in the article: python scripts/run-inference-mac.py [MODEL.pth]

With less memory: --strategy 'cpu bf16' or 'cpu fp32i8'; `generate --plan` says what each needs. On a Mac, `cpu` is what
is known to be right; users report wrong text from `mps`.
"""

import os

os.environ.setdefault("RWKV_JIT_ON", "1")
os.environ.setdefault("RWKV_CUDA_ON", "0")

import sys

from rwkv_nb.inference.demo import main

if __name__ == "__main__":
    sys.exit(main("cpu fp32"))
