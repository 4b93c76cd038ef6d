import os

import torch


# On a GPU the kernels of Triton are compiled. It looks here when it is imported, which some of transformers does.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
