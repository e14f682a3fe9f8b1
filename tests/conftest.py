import torch

torch.set_num_threads(1)  # small tensors: threads cost more than they give, and one thread is deterministic
