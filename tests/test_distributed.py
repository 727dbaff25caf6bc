"""One list of pictures drawn by several real processes, which may be killed."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hack_pipelines import HackVARPipeline
from hack_pipelines.cli import generate, main, progress
from hack_pipelines.distributed import PictureFolder, Worker, fingerprint, split_work
from hack_pipelines.methods import METHODS, RASTER_METHODS, get_method
from hack_pipelines.methods.spec import method_text
from hack_pipelines.result_folder import first_difference, replace_file

from .components import seeds, tiny_text_pipeline


SIZES = [(side, side) for side in (1, 2, 4, 6, 8, 12, 16)]
PROMPTS = ["a red apple", "a blue house", "a smiling cat", "a lighthouse in a storm"]
LONG_ENOUGH_SECONDS = 300


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("distributed") / "model"
    tiny_text_pipeline(SIZES).save_pretrained(folder)
    return str(folder)


def arguments(model: str, folder: Path, prompts: list[str], *more: str) -> list[str]:
    fixed = ["--model", model, "--device", "cpu", "--kv-budget", "0.3", "--method", "random", "--batch-size", "2"]
    return ["generate", *prompts, *fixed, "--seed", "5", "--output-dir", str(folder), *more]


def launched(argv: list[str], *prefix: str, **environment: str) -> subprocess.Popen:
    """A process at work, with as many threads as this one draws with."""
    return subprocess.Popen(
        [sys.executable, *prefix, "-m", "hack_pipelines.cli", *argv],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port() -> str:
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        return str(chosen.getsockname()[1])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]


# Real processes


def test_two_processes_draw_what_one_draws(model, tmp_path, capsys):
    prompts = [*PROMPTS, "a cat"]
    assert main(arguments(model, tmp_path / "one", prompts)) == 0
    alone = capsys.readouterr().out.splitlines()
    listed = f"{tmp_path / 'one'}: 5 pictures, listed in manifest.jsonl"
    assert alone[0] == listed
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    process = launched(arguments(model, tmp_path / "two", prompts), *torchrun)
    out, err = process.communicate(timeout=LONG_ENOUGH_SECONDS)
    assert process.returncode == 0, err
    # Whoever is the last says so, and nobody else; what the cache held is the main process' to say.
    lines = out.splitlines()
    assert [line for line in lines if "listed" in line] == [listed.replace("one", "two")]
    assert [line for line in lines if line.startswith("cache ")] == alone[1:]
    assert f"{tmp_path / 'two'}: 0 of 5 pictures are there, 3 batches left for 2 processes\n" in err
    # Pictures, records, manifest and settings, to the last byte.
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert len(contents(tmp_path / "one")) == 2 * 5 + 2


def test_a_rerun_completes_what_a_killed_process_left(model, tmp_path):
    # Enough batches that the process is caught at work.
    prompts = PROMPTS * 10
    folder = tmp_path / "killed"
    # Nobody watches over these two, as under `srun`. The main process dies, which the others met at.
    address = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    main_process, other = (
        launched(arguments(model, folder, prompts), **address, RANK=rank, LOCAL_RANK=rank) for rank in "01"
    )
    try:
        kill_after_its_first_picture(main_process, folder)
        out, err = other.communicate(timeout=LONG_ENOUGH_SECONDS)
    finally:
        for process in (main_process, other):
            process.kill()
            process.communicate()
    assert (main_process.returncode, other.returncode, out) == (-signal.SIGKILL, 0, ""), err
    # The other one has drawn its share: every second batch of two.
    left = PictureFolder(folder, prompts, 2, 5).missing()
    there = f"{40 - len(left)} of 40 pictures are there; the others still draw"
    assert err.endswith(f"{folder}: process 1 of 2: its share is done, {there}\n")
    assert left and all(index // 2 % 2 == 0 for index in left) and 0 not in left
    assert not (folder / "manifest.jsonl").exists()
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    for path in times:
        Image.open(path).load()
    assert main(arguments(model, folder, prompts)) == 0
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert main(arguments(model, tmp_path / "undisturbed", prompts)) == 0
    # A file that was being written when the process died keeps its other name.
    finished = {name: data for name, data in contents(folder).items() if not name.startswith(".")}
    assert finished == contents(tmp_path / "undisturbed")


def kill_after_its_first_picture(process: subprocess.Popen, folder: Path):
    end = time.monotonic() + LONG_ENOUGH_SECONDS
    while not any(folder.glob("00000-*.png")):
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(process.communicate()[1])
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)


def test_processes_without_a_folder_are_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert main(["generate", "a cat", "-o", str(tmp_path / "a.png")]) == 2
    assert capsys.readouterr().err == (
        "hack-pipelines, process 1 of 2: error: 2 processes were started, which cannot write one file together: give "
        "`--output-dir FOLDER`.\n"
    )


def test_a_device_map_is_refused_where_it_cannot_be_meant(monkeypatch, capsys, tmp_path):
    argv = ["generate", "a cat", "--output-dir", str(tmp_path), "--device-map", "balanced"]
    assert main([*argv, "--device", "cpu"]) == 2
    assert "`--device-map balanced` chooses the devices itself: leave out `--device cpu`." in capsys.readouterr().err
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert main(argv) == 2
    assert "but 4 processes were started on this one: start one on each machine" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_map_without_a_gpu_stays_on_the_cpu(model, tmp_path):
    argv = ["generate", "a cat", "--model", model]
    assert main([*argv, "--output-dir", str(tmp_path / "mapped"), "--device-map", "balanced"]) == 0
    assert main([*argv, "--output-dir", str(tmp_path / "plain")]) == 0
    assert contents(tmp_path / "mapped") == contents(tmp_path / "plain")


# One process, again and again


def test_a_record_tells_how_a_picture_was_drawn(model, tmp_path):
    assert main(arguments(model, tmp_path, PROMPTS[:3], "--top-p", "0.8", "--height", "32")) == 0
    pipe = HackVARPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    output = pipe(PROMPTS[2:3], generator=seeds(7), kv_budget=0.3, method="random", top_p=0.8, height=32)
    record = records(tmp_path)[2]
    assert json.loads((tmp_path / "00002-a-smiling-cat-7.json").read_text()) == record
    assert Image.open(tmp_path / record["file"]).tobytes() == output.images[0].tobytes()
    assert [record[name] for name in ("index", "seed", "prompt", "batch")] == [2, 7, "a smiling cat", [2, 3]]
    assert record["cache"] == json.loads(json.dumps(vars(output.cache_report)))
    assert record["model"] == {
        "name": model,
        "variant": None,
        "fingerprint": fingerprint(Path(model)),
        "head_profile": None,
        "dtype": "float32",
    }
    settings = record["settings"]
    assert settings["kv_budget"] == 0.3 and settings["method"] == "random:seed=0,protocol=post"
    # What was typed, and the model's own where nothing was.
    assert settings["sampling"]["top_p"] == [0.8] * 7 and settings["sampling"]["guidance"] == [3.0] * 7
    assert settings["scale_schedule"] == [list(size) for size in SIZES]
    assert record["device"] == "cpu" and record["software"].keys() >= {"hack_pipelines", "torch", "diffusers"}


@pytest.mark.parametrize("methods", [METHODS, RASTER_METHODS])
def test_a_method_in_a_record_can_be_typed(methods):
    for name, kind in methods.items():
        assert get_method(method_text(kind()), methods) == kind(), name
    other = get_method("hack++:alpha=0.25,strict=true,attention_budget=64MB")
    assert get_method(method_text(other)) == other != get_method("hack++")


def test_a_record_names_the_head_profile(model, tmp_path):
    def named(folder: str, path: Path | str, *more: str) -> str | None:
        argv = ["generate", "a cat", "--model", str(path), "--output-dir", str(tmp_path / folder), *more]
        assert main(argv) == 0
        return records(tmp_path / folder)[0]["model"]["head_profile"]

    assert named("made", model, "--kv-budget", "0.3") == "made on the spot"
    assert named("unneeded", model) is None
    calibrated = tmp_path / "calibrated"
    shutil.copytree(model, calibrated)
    profile = str(calibrated / "head_profile")
    assert main(["calibrate", "--model", str(calibrated), "-o", profile, "--num-samples", "1"]) == 0
    assert named("own", calibrated, "--kv-budget", "0.3") == "the model's own"
    assert named("typed", model, "--kv-budget", "0.3", "--head-profile", profile) == profile


def test_progress_is_told_in_logs(model, tmp_path, capsys, monkeypatch):
    # As if a minute had passed after every batch.
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    assert main(arguments(model, tmp_path, PROMPTS)) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == [
        f"{tmp_path}: 0 of 4 pictures are there, 2 batches left for 1 process",
        f"{tmp_path}: loading {model}",
    ]
    assert re.fullmatch(
        r"2 of 4 pictures, [\d.]+ a second, about 1 second left", lines[2].removeprefix(f"{tmp_path}: ")
    )
    assert lines[3:] == [f"{tmp_path}: 4 of 4 pictures"]
    # Nothing to do, nothing to tell.
    assert main(arguments(model, tmp_path, PROMPTS)) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("size", [(0, 0), (40, 100)])
def test_terminals_show_a_bar_where_they_have_room(model, tmp_path, size):
    main_end, own_end = os.openpty()
    termios.tcsetwinsize(own_end, size)
    argv = [sys.executable, "-m", "hack_pipelines.cli", *arguments(model, tmp_path, PROMPTS)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=own_end)
    os.close(own_end)
    shown = b""
    # Reading from a terminal that everybody has left is an error.
    with contextlib.suppress(OSError):
        while data := os.read(main_end, 4096):
            shown += data
    os.close(main_end)
    assert process.communicate()[0].startswith(bytes(tmp_path)) and process.returncode == 0
    assert b"0 of 4 pictures are there, 2 batches left for 1 process" in shown
    assert (b"Drawing: 100%" in shown) == (size != (0, 0))


@pytest.mark.parametrize(
    ("drawn", "missing", "seconds", "expected"),
    [
        (924, 6480, 60, ", 15.4 a second, about 7 minutes left"),
        (30, 10, 60, ", 30.0 a minute, about 20 seconds left"),
        (1, 2, 7200, ", 0.5 an hour, about 4.0 hours left"),
        (0, 2, 60, ""),
        (4, 0, 60, ""),
    ],
)
def test_the_pace_is_told_in_a_fitting_unit(drawn, missing, seconds, expected):
    assert progress.pace_text(drawn, missing, seconds) == expected


def test_an_interrupt_tells_what_is_there(model, tmp_path, capsys, monkeypatch):
    draw, calls = generate.draw, []

    def interrupted_at_the_second(family, arguments, batch):
        calls.append(batch)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return draw(family, arguments, batch)

    monkeypatch.setattr(generate, "draw", interrupted_at_the_second)
    assert main(arguments(model, tmp_path, PROMPTS)) == 130
    assert capsys.readouterr().err.endswith(
        "hack-pipelines: interrupted: 2 of 4 pictures are there; give the same command again to go on\n"
    )


def test_empty_files_count_as_missing(model, tmp_path):
    # As a power failure leaves them, where a file system does not write in order.
    assert main(arguments(model, tmp_path, PROMPTS)) == 0
    before = contents(tmp_path)
    for name in ("00001-a-blue-house-6.png", "00002-a-smiling-cat-7.json", "manifest.jsonl"):
        (tmp_path / name).write_bytes(b"")
    assert PictureFolder(tmp_path, PROMPTS, 2, 5).missing() == [1, 2]
    assert main(arguments(model, tmp_path, PROMPTS)) == 0
    assert contents(tmp_path) == before


def test_files_reach_the_disk_before_their_names(tmp_path, monkeypatch):
    order, path = [], tmp_path / "a.json"
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (order.append(f"sync {os.fstat(file).st_size}"), sync(file)))
    monkeypatch.setattr(os, "replace", lambda *names: (order.append("replace"), replace(*names)))
    replace_file(path, lambda new: new.write_text("four"))
    assert order == ["sync 4", "replace"] and path.read_text() == "four"


def test_a_picture_that_cannot_be_written_ends_with_1(model, tmp_path):
    # Files of a kilobyte are the largest allowed, as if the disk were full after that.
    argv = shlex.join([sys.executable, "-m", "hack_pipelines.cli", *arguments(model, tmp_path, PROMPTS)])
    done = subprocess.run(["bash", "-c", f"ulimit -f 1 && {argv}"], capture_output=True, text=True)
    assert done.returncode == 1
    name = r"00000-a-red-apple-5\.(json|png)"
    assert re.search(rf"hack-pipelines: error: \[Errno 27\] File too large: '{tmp_path}/{name}'\n$", done.stderr)


def test_what_is_there_is_not_drawn_again(model, tmp_path, capsys):
    folder = tmp_path / "pictures"
    assert main(arguments(model, folder, PROMPTS)) == 0
    before = contents(folder)
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    # A picture and a record are lost: their batches are drawn again, and the rest of these left alone.
    (folder / "00001-a-blue-house-6.png").unlink()
    (folder / "00002-a-smiling-cat-7.json").unlink()
    (folder / "manifest.jsonl").unlink()
    assert main(arguments(model, folder, PROMPTS)) == 0
    assert contents(folder) == before
    kept = ["00000-a-red-apple-5.png", "00003-a-lighthouse-in-a-storm-8.png"]
    assert {name for name in times if (folder / name).stat().st_mtime_ns == times[name]} == set(kept)
    # Nothing to do: the cache is not spoken of.
    capsys.readouterr()
    assert main(arguments(model, folder, PROMPTS)) == 0
    assert capsys.readouterr().out == f"{folder}: 4 pictures, listed in manifest.jsonl\n"


def test_other_settings_are_refused(model, tmp_path, capsys):
    assert main(arguments(model, tmp_path, PROMPTS)) == 0
    before = contents(tmp_path)

    def refused(prompts: list[str], *more: str) -> str:
        capsys.readouterr()
        assert main(arguments(model, tmp_path, prompts, *more)) == 2
        return capsys.readouterr().err.removeprefix("hack-pipelines: error: ")

    assert refused(PROMPTS, "--kv-budget", "0.5") == (
        f"{tmp_path} holds results with other settings: kv_budget was 0.3 and is now 0.5. Give `--kv-budget 0.3` to go on "
        "with it, or name another folder.\n"
    )
    for more, difference in (
        (["--batch-size", "4"], "batch_size was 2 and is now 4. Give `--batch-size 2` to"),
        (["--seed", "0"], "seed was 5 and is now 0. Give `--seed 5` to"),
        (["--dtype", "bf16"], "dtype was 'fp32' and is now 'bf16'. Give `--dtype fp32` to"),
        (["--negative-prompt", "a storm"], "None and is now 'a storm'. Leave out `--negative-prompt` to"),
        (["--num-images", "2"], "inputs[1] was 'a blue house' and is now 'a red apple'. Give the earlier list to"),
        (["--model", "demo"], "model was "),
    ):
        assert difference in refused(PROMPTS, *more)
    assert "inputs[2] was 'a smiling cat' and is now 'a dog'" in refused([*PROMPTS[:2], "a dog", *PROMPTS[3:]])
    assert "inputs had 4 entries and now has 2" in refused(PROMPTS[:2])
    # Nothing tells anybody to remove what took hours.
    assert "remove" not in refused(PROMPTS, "--kv-budget", "0.5")
    assert contents(tmp_path) == before


def test_another_number_of_threads_is_refused(model, tmp_path):
    assert main(arguments(model, tmp_path, PROMPTS)) == 0
    threads = torch.get_num_threads()
    process = launched(arguments(model, tmp_path, PROMPTS), OMP_NUM_THREADS=str(threads + 1))
    assert f"set OMP_NUM_THREADS={threads} and give the command again." in process.communicate()[1]
    assert process.returncode == 2


def test_a_trained_model_under_the_same_name_is_another(model, tmp_path, capsys):
    path = tmp_path / "model"
    pipe = HackVARPipeline.from_pretrained(model)
    pipe.save_pretrained(path)
    assert main(arguments(str(path), tmp_path / "pictures", ["a cat"])) == 0
    pipe.vae.decoder.conv_in.bias.data += 1e-3
    pipe.vae.save_pretrained(path / "vae")
    assert main(arguments(str(path), tmp_path / "pictures", ["a cat"])) == 2
    assert "holds results of other files under the name" in capsys.readouterr().err


def test_a_list_grows_by_whole_batches(model, tmp_path, capsys):
    assert main(arguments(model, tmp_path / "a", PROMPTS[:2])) == 0
    assert main(arguments(model, tmp_path / "a", PROMPTS[:3])) == 0
    assert main(arguments(model, tmp_path / "whole", PROMPTS[:3])) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "whole")
    capsys.readouterr()
    assert main(arguments(model, tmp_path / "a", PROMPTS)) == 2
    assert capsys.readouterr().err == (
        f"hack-pipelines: error: {tmp_path / 'a'} holds a list of 3 pictures. Its last batch has 1 of 2, and would change "
        "if pictures were added to the list: draw the new ones into another folder.\n"
    )
    assert contents(tmp_path / "a") == contents(tmp_path / "whole")


def test_a_command_that_drew_nothing_binds_nothing(model, tmp_path, capsys):
    assert main(arguments(model, tmp_path, PROMPTS, "--kv-budget", "1")) == 2
    assert "`kv_budget=1` leaves 1 tokens a head" in capsys.readouterr().err
    assert main(arguments(model, tmp_path, PROMPTS)) == 0


# Splitting


@given(st.integers(0, 40), st.integers(1, 7), st.sets(st.integers(0, 39)), st.integers(1, 5))
def test_every_missing_picture_is_drawn_once_in_its_own_batch(tmp_path_factory, total, batch_size, there, processes):
    folder = PictureFolder(tmp_path_factory.mktemp("split"), ["a cat"] * total, batch_size)
    picture = Image.new("RGB", (1, 1))
    for index in there:
        folder.save(index, "a cat", picture, {})
    batches = folder.unfinished_batches()
    shares = [Worker(index, processes).share(batches) for index in range(processes)]
    drawn = sorted(index for share in shares for batch in share for index in batch)
    assert len(drawn) == len(set(drawn)) and set(drawn) >= set(range(total)) - there
    # A batch is the same whatever is there, and it is drawn only if it has to be.
    for batch in batches:
        assert batch == range(batch[0], min(batch[0] + batch_size, total)) and batch[0] % batch_size == 0
        assert set(batch) - there
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_alone_a_process_does_everything():
    assert split_work(["a", "b", "c"]) == (Worker(0, 1, "cpu"), ["a", "b", "c"])


def test_the_manifest_is_there_when_all_is(tmp_path):
    folder = PictureFolder(tmp_path, ["a cat", "a dog"], seed=3)
    picture = Image.new("RGB", (1, 1))
    folder.save(1, "a dog", picture, {"prompt": "a dog"})
    assert not folder.write_manifest() and not folder.manifest.exists()
    folder.save(0, "a cat", picture, {"prompt": "a cat"})
    # The first one writes it.
    assert folder.write_manifest() and not folder.write_manifest()
    assert records(tmp_path) == [
        {"index": 0, "file": "00000-a-cat-3.png", "seed": 3, "prompt": "a cat"},
        {"index": 1, "file": "00001-a-dog-4.png", "seed": 4, "prompt": "a dog"},
    ]


@pytest.mark.parametrize(
    ("earlier", "wanted", "expected"),
    [
        (1, 2, "x was 1 and is now 2"),
        ([1, [2, 3]], [1, [2, 4]], "x[1][1] was 3 and is now 4"),
        ([1], [1, 2], "x had 1 entries and now has 2"),
        (None, "a" * 100, f"x was None and is now '{'a' * 76}..."),
    ],
)
def test_the_first_difference_is_named(earlier, wanted, expected):
    assert first_difference("x", earlier, wanted) == expected
