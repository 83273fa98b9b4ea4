"""What the crew's processes have imported when they are forked. No arithmetic here: a fork loses the threads that it starts."""

import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.pipelining
import torch.utils.tensorboard  # noqa: F401

import tests.parallel.cases
import tests.parallel.late
import tests.parallel.results  # noqa: F401
