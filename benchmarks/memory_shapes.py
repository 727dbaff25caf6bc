"""
What `hack_pipelines.memory` computes, against what is measured on the CPU: true width, two layers, random weights, HACK.

Weights are counted in models that were saved and loaded with their dtype; the cache is what its report measured; work and
decoder are peaks of the bytes of all live tensors, seen by a dispatch mode:

    python benchmarks/memory_shapes.py --output benchmarks/results
"""

import argparse
import csv
import tempfile
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import T5Config, T5EncoderModel

from hack_pipelines import memory
from hack_pipelines.activations import merge_bytes
from hack_pipelines.cache import Cache, FullCache, make_cache
from hack_pipelines.memory import Request
from hack_pipelines.methods import Geometry, StepView, get_method
from hack_pipelines.methods.hack import CONTEXTUAL
from hack_pipelines.models.autoencoder_bsq import MultiScaleBSQModel
from hack_pipelines.models.autoencoder_msvq import MultiScaleVQModel
from hack_pipelines.models.infinity_schedules import nearest_schedule
from hack_pipelines.models.transformer_infinity import InfinityCondition, InfinityTransformer2DModel
from hack_pipelines.models.transformer_var import VARTransformer2DModel
from hack_pipelines.pipelines.sampling import draw_tokens, filter_logits, guide


LAYERS = 2
BUDGETS = (None, 0.3, 0.1)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
COLUMNS = ("part", "model", "px", "dtype", "kv_budget", "computed", "measured", "ratio", "torch")


class LiveBytes(TorchDispatchMode):
    """
    Bytes of all tensors that operations made and that are still alive, each storage once, and their peak. Tensors that were
    there before are given, because an operation may make views of them.
    """

    def __init__(self, ignored: Iterable[torch.Tensor]):
        super().__init__()
        self.live = self.peak = 0
        self.known = WeakIdKeyDictionary()
        for tensor in ignored:
            self.known[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        self.peak = max(self.peak, self.live)
        return output

    def _see(self, storage: torch.UntypedStorage):
        if storage not in self.known:
            self.known[storage] = True
            self.live += storage.nbytes()
            weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, count: int):
        self.live -= count


@dataclass
class Table:
    """Rows of the result, printed as they come."""

    rows: list[dict]

    def add(self, part: str, model: str, px: int | str, dtype: str, budget, computed: int, measured: int):
        row = (part, model, px, dtype, budget, computed, measured, round(computed / measured, 3), torch.__version__)
        self.rows.append(dict(zip(COLUMNS, row)))
        print(*row, flush=True)


def loaded(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """The model after it was saved and loaded with a dtype."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return type(model).from_pretrained(folder, dtype=dtype).eval()


def tensors_of(model: torch.nn.Module) -> tuple[torch.Tensor, ...]:
    """All parameters and buffers."""
    return (*model.parameters(), *model.buffers())


def tensor_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(tensor.nbytes for tensor in tensors_of(model))


def draw_infinity(model: torch.nn.Module, cache: Cache, request: Request) -> int:
    """All scales of one image; returns the bytes that were made of the text."""
    prompts = [torch.randn(request.prompt_tokens, model.config.text_channels) for _ in range(request.images)]
    condition = InfinityCondition(prompts, guided=request.guided)
    inputs = None
    for step, length in enumerate(cache.schedule.lengths):
        model(inputs, condition, cache.schedule, step=step, kv_cache=cache)
        if step < len(cache.schedule) - 1:
            inputs = torch.randn(request.images, cache.schedule.lengths[step + 1], model.config.bits_per_token)
    kept = [
        *prompts,
        *(part for layer in condition.keys_values.values() for entry in layer for part in entry[1:]),
    ]
    kept += [value for value in vars(condition.states).values() if isinstance(value, torch.Tensor)]
    return sum(tensor.untyped_storage().nbytes() for tensor in kept)


def draw_var(model: torch.nn.Module, cache: Cache, request: Request) -> int:
    """All scales of one image, with the tokens drawn as the pipeline does."""
    labels = torch.tensor([0] * request.images + [model.config.num_classes] * request.images)
    inputs = None
    for step in range(len(cache.schedule)):
        logits = model(inputs, labels, step=step, kv_cache=cache, return_dict=False)[0]
        logits = guide(logits, 2.0, True)
        draw_tokens(filter_logits(logits, 900, 0.96))
        if step < len(cache.schedule) - 1:
            inputs = torch.randn(request.images, cache.schedule.lengths[step + 1], model.config.latent_channels)
    return 0


@torch.inference_mode()
def measure_drawing(model: torch.nn.Module, name: str, px: int, dtype: str, budget: float | None, table: Table):
    """Text, cache and work of drawing one image."""
    size = None if name.startswith("d") else (px, px)
    request = Request(name, size, budget, method="hack", dtype=DTYPES[dtype])
    infinity = request.shape.family == "infinity"
    config = model.config
    schedule = nearest_schedule(px, px) if infinity else model.schedule
    geometry = Geometry(schedule, LAYERS, config.num_attention_heads, config.attention_head_dim)
    plan = memory.plan_of(request, geometry)
    if plan is None:
        cache: Cache = FullCache(geometry.schedule, geometry.num_layers, request.guided)
    else:
        cache = make_cache(plan, get_method(request.method), request.guided)
    with LiveBytes(tensors_of(model)) as watch:
        text = (draw_infinity if infinity else draw_var)(model, cache, request)
    held = cache.report().bytes_allocated_peak * request.images
    table.add("cache", name, px, dtype, budget, memory.held_bytes(request, geometry, plan), held)
    if infinity and budget is None:
        table.add("text", name, px, dtype, "", memory.text_bytes(request, config), text)
    work = memory.work_bytes(request, config, geometry, plan, merge_by_product=False)
    table.add("work", name, px, dtype, budget, work, watch.peak - held - text)


@torch.inference_mode()
def measure_decoder(model: torch.nn.Module, name: str, px: int, dtype: str, table: Table):
    """Activations of decoding one image."""
    side = px // model.downscale_factor
    latents = torch.randn(1, model.config.latent_channels, side, side)
    with LiveBytes(tensors_of(model)) as watch:
        model.decode(latents)
    computed = memory.decoder_bytes(model.config, (px, px), 1, DTYPES[dtype].itemsize)
    table.add("decoder", name, px, dtype, "", computed, watch.peak)


@torch.inference_mode()
def measure_merge(table: Table):
    """HACK's merge as a GPU does it, at the last scale of 1024 px, on the meta device: it has shapes but no memory."""
    request = Request("2b", kv_budget=0.3, method="hack")
    geometry = memory.geometry_of(request)
    layer = memory.plan_of(request, geometry).layers[0]
    group = layer.labels.index(CONTEXTUAL)
    heads, stored, kept = layer.groups[group], layer.store[-2][group], layer.attend[-1][group]
    length = geometry.schedule.lengths[-1]

    def tensor(tokens: int) -> torch.Tensor:
        return torch.empty(2, len(heads), tokens, geometry.head_dim, dtype=request.dtype, device="meta")

    view = StepView(
        geometry.schedule,
        len(geometry.schedule) - 1,
        0,
        heads,
        CONTEXTUAL,
        kept,
        *(tensor(length) for _ in range(3)),
        *(tensor(stored) for _ in range(2)),
        kept,
        0,
        1.0,
        True,
    )
    positions = torch.empty(2, len(heads), kept, dtype=torch.long, device="meta")
    with LiveBytes((view.query, view.key, view.value, view.stored_key, view.stored_value)) as watch:
        get_method(request.method).merge(view, positions, tensor(kept), tensor(kept))
    computed = merge_bytes(
        stored + length,
        kept,
        max(stored, length),
        len(heads),
        geometry.head_dim,
        request.dtype.itemsize,
        by_product=True,
    )
    table.add("merge (shapes of a GPU)", "2b", 1024, "bf16", 0.3, 2 * len(heads) * computed, watch.peak)


def measure_transformers(table: Table, quick: bool):
    """Weights and drawing of both families."""
    for name, kind, sizes in (("2b", InfinityTransformer2DModel, (256, 512)), ("d30", VARTransformer2DModel, (256,))):
        shape = memory.MODELS[name].transformer
        for dtype in ("bf16", "fp32"):
            model = loaded(kind(**{**shape, "num_layers": LAYERS}), DTYPES[dtype])
            table.add(
                "transformer", name, "", dtype, "", memory.weight_bytes(model, DTYPES[dtype]), tensor_bytes(model)
            )
            for px in sizes[:1] if quick or dtype == "fp32" else sizes:
                for budget in BUDGETS:
                    measure_drawing(model, name, px, dtype, budget, table)


def measure_tokenizers(table: Table, quick: bool):
    """Weights and decoding of the tokenizers."""
    for name, kind, sizes in (
        ("2b", MultiScaleBSQModel, (256, 512)),
        ("8b", MultiScaleBSQModel, (256,)),
        ("d30", MultiScaleVQModel, (256,)),
    ):
        for dtype in ("bf16", "fp32"):
            model = loaded(kind(**memory.MODELS[name].tokenizer), DTYPES[dtype])
            table.add("tokenizer", name, "", dtype, "", memory.weight_bytes(model, DTYPES[dtype]), tensor_bytes(model))
            for px in sizes[:1] if quick else sizes:
                measure_decoder(model, name, px, dtype, table)


def measure_text_encoder(table: Table):
    """Weights of the text encoder."""
    config = T5Config(**{**memory.TEXT_ENCODER_CONFIG, "num_layers": LAYERS})
    encoder = loaded(T5EncoderModel(config), torch.float16)
    table.add(
        "text encoder", "2b", "", "fp16", "", memory.text_encoder_bytes(torch.float16, LAYERS), tensor_bytes(encoder)
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for memory_shapes.csv")
    parser.add_argument("--quick", action="store_true", help="256 px only")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    table = Table([])
    measure_merge(table)
    measure_text_encoder(table)
    measure_transformers(table, arguments.quick)
    measure_tokenizers(table, arguments.quick)
    arguments.output.mkdir(parents=True, exist_ok=True)
    with open(arguments.output / "memory_shapes.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(table.rows)


if __name__ == "__main__":
    main()
