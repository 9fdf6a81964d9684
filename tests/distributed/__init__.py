"""The tests of llama_kernels.distributed and of models on several processes. All need torch.distributed."""

import pytest
import torch.distributed as dist

if not dist.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)
