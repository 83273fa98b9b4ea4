"""One Llama over many ranks: which parameter is cut where, and the transformations that cut it. Built on torch.distributed."""
