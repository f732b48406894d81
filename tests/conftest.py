import torch

# The models are tiny: threads would only wait for each other, and the tests run in processes side by side.
torch.set_num_threads(1)
