"""One thread for every test: the models are so small that several only wait for each other."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
