"""Reading state dicts that somebody else saved, without running anything that they contain."""

import json
import pickletools
import re
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file


PICKLE_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin")
ZIP_START = b"PK\x03\x04"
# What a checkpoint may name and still be nothing but tensors: torch's own reader refuses all the rest.
PLAIN_MODULES = ("torch", "torch._utils", "torch.storage", "torch._tensor", "collections", "_codecs")
LFS_START = b"version https://git-lfs"
# Where the authors' own files keep the state dict among other things: tokenizers and training checkpoints of Infinity.
KNOWN_NESTS = (("vae",), ("trainer", "gpt_fsdp"))
# Files that say in which of several files a tensor is, and how the names of those files end.
INDEXES = (("*.safetensors.index.json", (".safetensors",)), ("pytorch_model.bin.index.json", PICKLE_SUFFIXES))


def read_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """
    The tensors of a checkpoint by name. Where the format allows it they are mapped from the file, not read.

    Args:
        path (`str` or `Path`):
            A `.safetensors` file, a pickle file of torch (`.pth`, in the zip format or the one before it), or a folder
            of such files, which together hold one state dict: those that its index names, or all if it has none.

    Returns:
        `dict[str, torch.Tensor]`: on the CPU, in the dtypes of the file.

    Raises:
        `ValueError`: if there is no such file, it is damaged, it holds something else than named tensors, or reading it
            would run code that it brings along.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return read_folder(path)
    if not path.is_file():
        raise ValueError(f"There is no file or folder {path}: give the path of a downloaded checkpoint.")
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{path} is empty: download it again.")
    with path.open("rb") as stream:
        start = stream.read(len(LFS_START))
    if start == LFS_START:
        raise ValueError(
            f"{path} is a Git LFS pointer of {size} bytes, not the file itself: fetch it with `git lfs pull`."
        )
    content = read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path, start)
    return checked(path, unwrapped(content))


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    """One state dict out of all shards of a folder; safetensors files win over pickles of the same tensors."""
    files: list[Path] = []
    for pattern, suffixes in INDEXES:
        index = find_index(folder, pattern)
        if index is not None:
            files = [folder / name for name in sorted(set(read_weight_map(index, suffixes).values()))]
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise ValueError(
                    f"{folder} has no {shown(missing)}, which {index.name} names: the download is incomplete."
                )
        else:
            files = sorted(file for file in folder.iterdir() if file.suffix in suffixes)
        if files:
            break
    if not files:
        raise ValueError(f"{folder} holds no checkpoint: expected *.safetensors or *{', *'.join(PICKLE_SUFFIXES)}.")
    state_dict: dict[str, torch.Tensor] = {}
    for file in files:
        shard = read_state_dict(file)
        twice = sorted(state_dict.keys() & shard.keys())
        if twice:
            raise ValueError(
                f"{file} repeats {shown(twice)} of another file in {folder}: the folder must hold the shards of one model."
            )
        state_dict.update(shard)
    return state_dict


def find_index(folder: Path, pattern: str) -> Path | None:
    """The file in a folder that says in which of several files a tensor is, if there is one."""
    indexes = sorted(folder.glob(pattern))
    if len(indexes) > 1:
        raise ValueError(
            f"{folder} holds several models, of {', '.join(index.name for index in indexes)}: give a folder with one."
        )
    return indexes[0] if indexes else None


def read_weight_map(index: Path, suffixes: tuple[str, ...]) -> dict[str, str]:
    """
    File of every tensor, as an index says; whether the files are there is not looked at.

    Args:
        index (`Path`):
            The index.
        suffixes (`tuple[str, ...]`):
            How the names of the files may end.

    Raises:
        `ValueError`: if the index is damaged, or names a file that is not beside it.
    """
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{index} is damaged ({error!r}): download it again.") from error
    files = weight_map.values() if isinstance(weight_map, dict) else ()
    if not files or not all(isinstance(file, str) for file in files):
        raise ValueError(f"{index} is damaged: `weight_map` must hold the file of every weight.")
    for file in sorted(set(files)):
        # Nothing that could be a path, nor a pattern where files of this name are asked for.
        if not re.fullmatch(r"[\w-][\w.-]*", file) or Path(file).suffix not in suffixes:
            raise ValueError(f"{index} names {file!r}: it may only name {', '.join(suffixes)} files beside it.")
    return weight_map


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """A safetensors file, mapped."""
    try:
        return load_file(path, device="cpu")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}): download it again.") from error


def read_pickle(path: Path, start: bytes) -> object:
    """What a pickle file of torch holds, through the reader that builds tensors and plain containers only."""
    zipped = start.startswith(ZIP_START)
    if zipped and not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is cut short: its end, the table of contents, is missing. Download it again.")
    try:
        return torch.load(str(path), map_location="cpu", weights_only=True, mmap=zipped)
    # A damaged pickle makes its reader fail in any way there is.
    except Exception as error:
        message = str(error)
        found = sorted({*unsafe_globals(path, zipped), *re.findall(r"GLOBAL (\S+)", message)})
        if found:
            raise ValueError(
                f"{path} is not read, because that could run code: besides tensors it names {', '.join(found)}. Where you "
                "trust the file, load it yourself and save its state dict alone as .safetensors."
            ) from error
        # Torch advises to read it unsafely, which is no advice to pass on.
        unreadable = not message or message.startswith("Weights only load failed")
        reason = f"{type(error).__name__} while reading" if unreadable else message.splitlines()[0]
        raise ValueError(f"{path} is damaged or no checkpoint of torch ({reason}): download it again.") from error


def unsafe_globals(path: Path, zipped: bool) -> list[str]:
    """Names that a pickle would import and that no plain state dict needs; nothing is imported to find them."""
    names: list[str] = []
    # Damaged files end the search: there is no more to find than what was found before.
    with suppress(Exception):
        if zipped:
            with zipfile.ZipFile(path) as archive:
                for record in archive.namelist():
                    if record.endswith("data.pkl"):
                        with archive.open(record) as stream:
                            collect_globals(stream, names)
        else:
            with path.open("rb") as stream:
                # The format before the zip one is several pickles in a row, then raw data.
                while True:
                    collect_globals(stream, names)
    return [name for name in names if name.rpartition(".")[0] not in PLAIN_MODULES]


def collect_globals(stream: IO[bytes], names: list[str]):
    """Append what one pickle would import to `names`."""
    strings: list[str] = []
    for operation, argument, _ in pickletools.genops(stream):
        if operation.name == "GLOBAL":
            names.append(str(argument).replace(" ", "."))
        elif operation.name == "STACK_GLOBAL" and len(strings) > 1:
            names.append(".".join(strings[-2:]))
        elif isinstance(argument, str):
            strings.append(argument)


def unwrapped(content: object) -> object:
    """The state dict inside, if `content` holds it in a place where the authors' files do."""
    found = []
    for nest in KNOWN_NESTS:
        inner = content
        for key in nest:
            inner = inner.get(key) if isinstance(inner, dict) else None
        if isinstance(inner, dict):
            found.append(inner)
    return found[0] if len(found) == 1 else content


def checked(path: Path, content: object) -> dict[str, torch.Tensor]:
    """`content` if it is named tensors and nothing else."""
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}: expected a state dict, tensors by name.")
    if not content:
        raise ValueError(f"{path} holds an empty state dict: nothing was saved to it.")
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, torch.Tensor) and value.layout is torch.strided:
            continue
        inner = ["".join(f"[{part!r}]" for part in parts) for parts in nested_state_dicts(content)]
        if inner and not isinstance(value, torch.Tensor):
            raise ValueError(
                f"{path} is a training checkpoint, with state dicts inside at {', '.join(inner)}: save the one that is "
                "wanted as a file of its own."
            )
        kind = f"a {type(value).__name__}"
        if isinstance(value, torch.Tensor) and value.layout is not torch.strided:
            kind = f"a sparse tensor ({value.layout})"
        raise ValueError(f"{path} holds {kind} under {key!r}: expected a state dict, tensors by name.")
    return {key: value.detach() for key, value in content.items()}


def nested_state_dicts(content: object, parts: tuple = ()) -> Iterator[tuple]:
    """Keys that lead to state dicts inside a dictionary, four levels deep at most."""
    if not isinstance(content, dict) or not content or len(parts) > 4:
        return
    if all(isinstance(value, torch.Tensor) for value in content.values()):
        yield parts
        return
    for key, value in content.items():
        yield from nested_state_dicts(value, (*parts, key))


def shown(names: list[str], limit: int = 4) -> str:
    """The first few of many names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
