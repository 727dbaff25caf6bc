from pathlib import Path

import pytest
import torch
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import constants
from transformers.utils import logging as transformers_logging

from .hub_server import HubServer


FIXTURES = Path(__file__).parent / "fixtures"

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def progress_bars():
    """The command line switches bars off for the whole process where nobody looks at them: no later test may miss them."""
    yield
    diffusers_logging.enable_progress_bar()
    transformers_logging.enable_progress_bar()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server, and the Hub's client pointed to it with an empty cache."""
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        # The server speaks LFS, not Xet; and no token of this machine may change what a test sees.
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        # Nothing that takes a relative path for its cache can leave files in the repository.
        monkeypatch.chdir(tmp_path)
        yield server
