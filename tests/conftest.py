"""Loads the pack as ComfyUI does, inside this process.

COMFYUI_PATH names the ComfyUI to test against, ATLASVID_CARD asks for the graphics card in place of
the CPU; `tools/test.py` sets both.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "tools"))
from environment import sharing_cores, threads
from pack_loader import load_comfyui, load_pack

os.environ.update(sharing_cores())  # before PyTorch is imported


def pytest_report_header():
    return f"PyTorch: up to {threads()} threads, which sleep while they wait for each other"


COMFYUI = Path(os.environ.get("COMFYUI_PATH", ""))
if not (COMFYUI / "comfy").is_dir():
    pytest.exit("COMFYUI_PATH does not name a ComfyUI folder: run `python tools/test.py`", 2)
if TIER := os.environ.get("ATLASVID_CARD"):
    # The stock forward is compared to 1e-5: no product may round its factors to TF32.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
load_comfyui(COMFYUI, "--force-fp32" if TIER else "--cpu")
load_pack()
