from pathlib import Path

import torch


FIXTURES = Path(__file__).parent / "fixtures"

torch.set_num_threads(1)
