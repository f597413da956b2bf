"""An output folder and a model for every test of kept renders."""

import folder_paths
import pytest
from wan import small_wan


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch):
    """ComfyUI's output folder, empty."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    return tmp_path / "output"


@pytest.fixture(scope="session")
def wan():
    return small_wan(num_layers=2, ffn_dim=256)
