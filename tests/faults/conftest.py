"""A real server for faults on purpose; `tools/soak.py` runs the long form of the same."""

import os
import random
import sys
from pathlib import Path

import pytest
from faults import files
from faults.host import Host


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory):
    random.seed(20)
    base = tmp_path_factory.mktemp("faults")
    host = Host(Path(sys.executable), Path(os.environ["COMFYUI_PATH"]), base)
    files.prepare(host)
    yield host
    host.stop()
