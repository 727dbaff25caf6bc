"""Tiny models under the names that the pages use, on the server of the tests or as files beside the reader."""

import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from ..components import tiny_t5
from ..conftest import FIXTURES
from ..hub_server import HubServer
from ..integrations.folders import save_emu3, save_janus
from ..released import SIDES_256, outlined, released_tokenizer, released_transformer


Files = dict[str, bytes]
GENERATION = "generation_config.json"
# Widths of VAR's tokenizer (the last is three in one), and those of the stand-in.
NARROWER = {160: 32, 320: 64, 640: 128, 1920: 384}


def as_pth(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def saved_by(save: Callable[[Path], object]) -> Files:
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        paths = [path for path in Path(folder).rglob("*") if path.is_file()]
        return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def with_random_weights(outline: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {key: 0.02 * torch.randn(tensor.shape) if tensor.is_meta else tensor for key, tensor in outline.items()}


def infinity_files() -> Files:
    transformer, tokenizer = (
        load_file(FIXTURES / "infinity" / f"{name}.safetensors") for name in ("transformer", "vae")
    )
    return {
        "README.md": b"original",
        "infinity_2b_reg.pth": as_pth(transformer),
        "infinity_vae_d32reg.pth": as_pth({"vae": tokenizer}),
    }


def janus_files() -> Files:
    """Twelve lines, so that a sixth of them is a budget that the methods can work with."""
    template = "{% for message in messages %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endfor %}"
    files = saved_by(lambda folder: save_janus(folder, side=12))
    # The released one was not made from the model's configuration, and keeps what this library would drop.
    generation = {key: value for key, value in json.loads(files[GENERATION]).items() if key != "_from_model_config"}
    return {**files, "chat_template.jinja": template.encode(), GENERATION: json.dumps(generation).encode()}


def var_files() -> Files:
    """Keys and schedule of the released VAR-d30, at depth 2 and with a narrow tokenizer: it knows ImageNet's classes."""
    tokenizer = {key: tuple(NARROWER.get(size, size) for size in shape) for key, shape in released_tokenizer().items()}
    return {
        "README.md": b"original",
        "var_d30.pth": as_pth(with_random_weights(outlined(released_transformer(2, SIDES_256, False), SIDES_256))),
        "vae_ch160v4096z32.pth": as_pth(with_random_weights(outlined(tokenizer))),
    }


REPOS: dict[str, Callable[[], Files]] = {
    "FoundationVision/Infinity": infinity_files,
    "FoundationVision/var": var_files,
    "google/flan-t5-xl": lambda: saved_by(tiny_t5),
    "deepseek-community/Janus-Pro-1B": janus_files,
    "BAAI/Emu3-Gen-hf": lambda: saved_by(save_emu3),
}
LOCAL_FILES: dict[str, Callable[[], Files]] = {
    "infinity_2b_reg.pth": infinity_files,
    "infinity_vae_d32reg.pth": infinity_files,
    "var_d30.pth": var_files,
    "vae_ch160v4096z32.pth": var_files,
}


# Infinity opens its text encoder by itself.
NEEDED_BY = {"google/flan-t5-xl": "FoundationVision/Infinity"}


# What else opening a repo asks for.
ALSO = {"FoundationVision/Infinity": "google/flan-t5-xl"}


def provide(text: str, hub: HubServer, folder: Path):
    """Put what the blocks of a page name where a reader with a network, and with downloaded files, has it."""
    text += "".join(other for name, other in ALSO.items() if name in text)
    for name, files in REPOS.items():
        if name in text or name in NEEDED_BY and NEEDED_BY[name] in text:
            hub.commit(name, files())
    for name, files in LOCAL_FILES.items():
        if name in text:
            (folder / name).write_bytes(files()[name])
    if "--text-encoder flan-t5-xl" in text:
        tiny_t5(folder / "flan-t5-xl")
