"""What the command line answers when something goes wrong, and with which exit status."""

import argparse
import errno
from pathlib import Path

import pytest
from huggingface_hub import constants

from hack_pipelines.cli import main
from hack_pipelines.cli.errors import other_settings_text, status_of
from hack_pipelines.result_folder import OtherSettings, replace_file


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("a"), 2),
        (ImportError("a"), 2),
        (FileNotFoundError(errno.ENOENT, "a"), 2),
        (PermissionError(errno.EACCES, "a"), 2),
        (OSError(errno.ENAMETOOLONG, "a"), 2),
        (OSError(errno.ENOSPC, "a"), 1),
        (ConnectionError("a"), 1),
        (MemoryError("a"), 1),
    ],
)
def test_what_may_go_better_next_time_has_another_status(error, status):
    assert status_of(error) == status


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
def test_a_full_disk_is_named(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        replace_file(path, lambda new: Path("/dev/full").write_text("a"))


def test_a_comparison_by_exit_status_keeps_1_for_a_difference(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert main(["profile", "show", "someone/profile"]) == 1
    assert main(["profile", "diff", "someone/profile", "someone/other"]) == 2


@pytest.mark.parametrize(
    ("name", "earlier", "wanted", "expected"),
    [
        (
            "omp_num_threads",
            1,
            2,
            "set was drawn with 1 thread a process, here it is 2, which changes last bits: set OMP_NUM_THREADS=1 and give "
            "the command again.",
        ),
        ("model", "a b", "c", "Give `--model 'a b'` to go on with it, or name another folder."),
        ("sampling", ["sampled", "greedy"], [], "Give `--sampling sampled greedy` to go on with it"),
        ("more_smooth", True, None, "Give `--more-smooth` to go on with it"),
        ("a_setting_of_a_script", 1, 2, "Give the earlier value to go on with it, or name another folder."),
    ],
)
def test_what_was_typed_is_named(name, earlier, wanted, expected):
    typed = argparse.Namespace(model="c", sampling=[], more_smooth=None)
    assert expected in other_settings_text(OtherSettings(Path("set"), name, earlier, wanted), typed)
