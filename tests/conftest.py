import os

import torch

# The models are tiny: threads would only wait for each other, and the tests run in processes side by side.
torch.set_num_threads(1)

# Triton reads it when it is imported: without a GPU its kernels are interpreted.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
