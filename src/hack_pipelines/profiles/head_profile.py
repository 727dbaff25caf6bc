"""The Hub artifact with everything that compression may know of a model's heads."""

import json
import math
import re
from collections.abc import Iterable
from copy import copy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import CommitInfo, ModelCard, ModelHubMixin
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..hub.cards import CARD_NAME
from ..hub.client import snapshot
from ..hub.errors import explained
from ..hub.files import DOWNLOAD_AGAIN, read_json
from ..hub.registry import split_reference
from ..schedule import Schedule
from .statistics import statistic_shapes


if TYPE_CHECKING:
    from PIL.Image import Image

    from ..methods.base import Geometry


FORMAT_VERSION = 1
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "profile.safetensors"
HEAD_MAP_NAME = "head_map.png"
FILES = (CARD_NAME, CONFIG_NAME, HEAD_MAP_NAME, WEIGHTS_NAME)
# The share of contextual heads that the saved picture shows; HACK's default.
SHOWN_ALPHA = 0.5

FACTS = (
    "base_model",
    "base_revision",
    "family",
    "num_layers",
    "num_heads",
    "head_dim",
    "schedule",
    "dtype",
    "sampling",
    "inputs",
    "seeds",
    "software",
)


class HeadProfile(
    ModelHubMixin,
    library_name="hack_pipelines",
    license="apache-2.0",
    tags=["head-profile", "kv-cache-compression", "visual-autoregressive"],
):
    """
    Statistics of the attention of every head of one model, recorded while it drew images from known inputs.

    [`calibrate`] makes one; `save_pretrained`, `from_pretrained` and `push_to_hub` keep and share it: the arrays in
    `profile.safetensors`, everything else in `config.json`, with a model card and a picture of the head types.

    Args:
        mean (`dict[str, torch.Tensor]`):
            Means over samples of the arrays that [`statistic_shapes`] names, or of some of them; kept in float32.
        variance (`dict[str, torch.Tensor]`):
            Population variances over samples of the same arrays; zeros for one sample.
        base_model (`str`, *optional*):
            Repository or name of the model.
        base_revision (`str`, *optional*):
            Commit of that repository.
        family (`str`):
            Backbone, `"var"` for example.
        num_layers, num_heads, head_dim (`int`):
            Self-attention layers of the model, heads of a layer, channels of a head.
        schedule (`list[list[int]]`):
            Height and width of the token map of every scale.
        dtype (`str`):
            Of the queries and keys that were recorded, `"bfloat16"` for example.
        sampling (`dict`):
            How tokens were drawn: guidance, temperature and filters, as the pipeline's sampling settings name them.
        inputs (`list[int | str]`):
            Class or prompt of every sample.
        seeds (`list[int]`):
            Seed of every sample.
        software (`dict[str, str]`):
            Versions of the packages that made it.

    Raises:
        `ValueError`: if there is no array, or one that is unknown, has another shape than the model, or is not finite.
    """

    def __init__(
        self,
        mean: dict[str, torch.Tensor],
        variance: dict[str, torch.Tensor],
        *,
        family: str,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        schedule: list[list[int]],
        dtype: str,
        sampling: dict[str, Any],
        inputs: list[int | str],
        seeds: list[int],
        software: dict[str, str],
        base_model: str | None = None,
        base_revision: str | None = None,
    ):
        self.base_model, self.base_revision, self.family = base_model, base_revision, family
        self.num_layers, self.num_heads, self.head_dim = num_layers, num_heads, head_dim
        self.schedule = checked_schedule(schedule)
        self.dtype, self.software = dtype, dict(software)
        # What JSON makes of it, so that a profile equals its stored form.
        self.sampling = json.loads(json.dumps(sampling))
        self.inputs, self.seeds = list(inputs), list(seeds)
        if not self.seeds or len(self.inputs) != len(self.seeds):
            raise ValueError(
                f"A head profile needs one input and one seed for each sample but has {len(self.inputs)} `inputs` and "
                f"{len(self.seeds)} `seeds`."
            )
        for name, value in (("num_layers", num_layers), ("num_heads", num_heads), ("head_dim", head_dim)):
            if type(value) is not int or value < 1:
                raise ValueError(f"`{name}` must be a positive int but is {value!r}.")
        shapes = statistic_shapes(num_layers, num_heads, len(self.schedule))
        if not mean or not mean.keys() == variance.keys() <= shapes.keys():
            raise ValueError(
                f"`mean` must hold the same arrays as `variance`, some of {sorted(shapes)}, but holds {sorted(mean)} and "
                f"`variance` {sorted(variance)}."
            )
        shapes = {name: shape for name, shape in shapes.items() if name in mean}
        self.mean = checked_arrays("mean", mean, shapes)
        self.variance = checked_arrays("variance", variance, shapes)

    def check_holds(self, arrays: Iterable[str], method: str):
        """
        Refuse a method that reads an array which the profile lacks.

        Args:
            arrays (`Iterable[str]`):
                What the method reads.
            method (`str`):
                Its name.

        Raises:
            `ValueError`: naming what is missing.
        """
        missing = [name for name in arrays if name not in self.mean]
        if missing:
            raise ValueError(
                f"The head profile of {self.title} has no {', '.join(f'`{name}`' for name in missing)}, which method "
                f"{method!r} needs: make a complete one with `hack-pipelines calibrate`."
            )

    def for_schedule(self, schedule: Schedule) -> "HeadProfile":
        """
        The profile as a drawing with another schedule of the same model reads it.

        A schedule with as many scales is read scale by scale. For one with more or fewer, every scale takes the statistics
        of the recorded scale whose number of tokens is nearest on a logarithmic scale, the larger of two; of the attention
        mass, what a token of a source scale got is taken over, and each row is scaled to a sum of 1.

        Args:
            schedule (`Schedule`):
                What is drawn.
        """
        if len(schedule) == len(self.schedule):
            return self
        # Quotients, whose order is that of the distances of logarithms: equal ones are equal in floating point too.
        # Reversed, so that the larger of two equally near scales is the first.
        recorded = torch.tensor(self.schedule.lengths, dtype=torch.float64).flip(0)[None]
        wanted = torch.tensor(schedule.lengths, dtype=torch.float64)[:, None]
        distances = torch.maximum(wanted / recorded, recorded / wanted)
        nearest = len(self.schedule) - 1 - distances.argmin(1)
        resampled = copy(self)
        resampled.schedule = schedule
        resampled.mean, resampled.variance = (
            {name: self._resampled(name, array, nearest, schedule) for name, array in arrays.items()}
            for arrays in (self.mean, self.variance)
        )
        return resampled

    def _resampled(self, name: str, array: torch.Tensor, nearest: torch.Tensor, schedule: Schedule) -> torch.Tensor:
        """An array whose third dimension, and for `mass` the fourth, is taken from other scales."""
        array = array[:, :, nearest]
        if name != "mass":
            return array
        per_token = array[..., nearest] / torch.tensor(self.schedule.lengths)[nearest]
        mass = (per_token * torch.tensor(schedule.lengths)).tril()
        return mass / mass.sum(-1, keepdim=True).clamp_min(torch.finfo(mass.dtype).tiny)

    @property
    def num_samples(self) -> int:
        """Images that were recorded."""
        return len(self.seeds)

    @property
    def has_types(self) -> bool:
        """Whether it holds what tells head types apart; profiles from HeatKV orders do not."""
        return "colvar" in self.mean

    @property
    def scores(self) -> torch.Tensor:
        """
        What tells head types apart, `[num_layers, num_heads]`: the variance over queries at the last scale.

        Raises:
            `ValueError`: if the profile does not hold it.
        """
        if not self.has_types:
            raise ValueError(
                f"The head profile of {self.title} has no `colvar`, so it cannot tell head types apart: it holds "
                f"{sorted(self.mean)} only. Profiles that were read from HeatKV orders know no more; make a full one with "
                "`hack-pipelines calibrate`."
            )
        return self.mean["colvar"][:, :, -1]

    def contextual_heads(self, alpha: float) -> torch.Tensor:
        """
        Heads whose attention depends least on the query, out of all heads of the model (section 3.2 of HACK).

        Args:
            alpha (`float`):
                Share of contextual heads. Their number is `alpha * num_layers * num_heads`, rounded half up; heads of equal
                variance are taken by layer, then head.

        Returns:
            `torch.Tensor`: boolean `[num_layers, num_heads]`, on the CPU.

        Raises:
            `ValueError`: if `alpha` lies outside [0, 1].
        """
        scores = self.scores.flatten()
        contextual = torch.zeros(scores.shape, dtype=torch.bool)
        contextual[scores.argsort(stable=True)[: self._num_contextual(alpha)]] = True
        return contextual.view(self.num_layers, self.num_heads)

    def gap(self, alpha: float) -> float:
        """
        Variance just above the cut over that just below it: near 1, `alpha` cuts through heads of one kind.

        Raises:
            `ValueError`: if `alpha` leaves all heads on one side.
        """
        count = self._num_contextual(alpha)
        if not 0 < count < self.scores.numel():
            raise ValueError(f"`alpha` {alpha} puts all heads on one side, so there is no gap between the sides.")
        below, above = self.scores.flatten().sort().values[count - 1 : count + 1].tolist()
        if below == 0:
            return 1.0 if above == 0 else math.inf
        return above / below

    def head_map(self, alpha: float = SHOWN_ALPHA) -> "Image":
        """
        Picture of the head types: a cell a head, coloured by its variance, contextual heads marked with a dot.

        Args:
            alpha (`float`, *optional*, defaults to 0.5):
                Share of contextual heads.
        """
        from .head_map import draw_head_map

        return draw_head_map(self.scores, self.contextual_heads(alpha), self.title, alpha)

    @property
    def title(self) -> str:
        """What the picture and the card call the model."""
        return self.base_model or f"an unnamed {self.family} model"

    def check_fits(self, geometry: "Geometry"):
        """
        Refuse a model that the profile was not made for.

        Args:
            geometry ([`Geometry`]):
                Of the model.

        Raises:
            `ValueError`: naming each difference.
        """
        facts = (
            ("layers", self.num_layers, geometry.num_layers),
            ("heads a layer", self.num_heads, geometry.num_heads),
            ("channels a head", self.head_dim, geometry.head_dim),
            ("scales of sizes", sizes_text(self.schedule), sizes_text(geometry.schedule)),
        )
        differences = [f"{what} {of_model} (profile: {own})" for what, own, of_model in facts if own != of_model]
        if differences:
            raise ValueError(
                f"The head profile of {self.title} does not fit this model, which has {', '.join(differences)}. Attach the "
                "profile that was made for it, or make one with `hack-pipelines calibrate`."
            )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, HeadProfile):
            return NotImplemented
        own, others = self._tensors(), other._tensors()
        return (
            self._config() == other._config()
            and own.keys() == others.keys()
            and all(torch.equal(tensor, others[name]) for name, tensor in own.items())
        )

    # Equal profiles can be changed apart, so they have no hash.
    __hash__ = None  # type: ignore[assignment]

    def generate_model_card(self, *args, **kwargs) -> ModelCard:
        """The card that `save_pretrained` and `push_to_hub` write; `kwargs` as in `profile_card`, and `license`."""
        from .model_card import profile_card

        metadata = self._hub_mixin_info.model_card_data.to_dict()
        license = kwargs.pop("license", None) or metadata["license"]
        return profile_card(self, {**metadata, "license": license}, **kwargs)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        license: str | None = None,
        results: str | Path | None = None,
        commit_message: str = "Upload head profile",
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        tag: str | None = None,
        replace_card: bool = False,
    ) -> CommitInfo:
        """
        Upload the profile with its card and head map, in one commit.

        Args:
            repo_id (`str`):
                Repository, which is made where it is missing.
            license (`str`, *optional*, defaults to `"apache-2.0"`):
                Of the profile, as the Hub names it.
            results (`str` or `Path`, *optional*):
                Folder of a `hack-pipelines compare` that was drawn with it, for the card.
            commit_message (`str`, *optional*, defaults to `"Upload head profile"`):
                What the commit is called.
            private (`bool`, *optional*):
                Whether a repository that is made now can be seen by its owner only; the owner's setting by default.
            token (`str` or `bool`, *optional*):
                That may write; by default the one of `hf auth login`.
            revision (`str`, *optional*, defaults to `"main"`):
                Branch, which is made where it is missing.
            create_pr (`bool`, *optional*, defaults to `False`):
                Whether to propose the commit as a pull request.
            tag (`str`, *optional*):
                Name of a tag for the commit, so that others can pin it.
            replace_card (`bool`, *optional*, defaults to `False`):
                Whether to write over a card on the Hub that somebody edited.

        Returns:
            [`~huggingface_hub.CommitInfo`]: the commit.

        Raises:
            `ValueError`: if the tag is taken, the token may not write, or `results` is no comparison.
            `ConnectionError`: if the Hub cannot be reached.
        """
        from ..hub.upload import upload

        card = {"license": license, "results": results, "repo_id": repo_id, "revision": tag or revision}
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, model_card_kwargs=card)
            return upload(
                Path(folder), repo_id, commit_message, private, token, revision, create_pr, tag, replace_card
            )

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> "HeadProfile":
        """
        Load a profile that `save_pretrained` or `push_to_hub` stored.

        Args:
            name_or_path (`str` or `Path`):
                Folder, or repository on the Hub; `"owner/name@revision"` pins one.
            revision (`str`, *optional*):
                Branch, tag or commit of the repository.
            token (`str` or `bool`, *optional*):
                To read a private repository; by default the one of `hf auth login`.
            cache_dir (`str` or `Path`, *optional*):
                Where downloads are kept.
            local_files_only (`bool`, *optional*, defaults to `False`):
                Whether to look into that cache only.
            force_download (`bool`, *optional*, defaults to `False`):
                Whether to download again what is there.

        Raises:
            `ValueError`: if there is no profile, or one that is damaged or newer than this package; the message names the
                file and what is wrong with it.
            `ConnectionError`: if the Hub cannot be reached and the cache does not have it.
        """
        folder = Path(name_or_path).expanduser()
        if not folder.is_dir():
            name, pinned = split_reference(str(name_or_path))
            if pinned is not None and revision not in (None, pinned):
                raise ValueError(
                    f"{str(name_or_path)!r} names another revision than `revision`, which is {revision!r}."
                )
            options = {
                "revision": pinned or revision,
                "token": token,
                "cache_dir": cache_dir,
                "local_files_only": local_files_only,
                "force_download": force_download,
            }
            with explained(name, pinned or revision):
                # Both files of one commit.
                folder = snapshot(name, [CONFIG_NAME, WEIGHTS_NAME], [], options)
        arguments = read_config(folder / CONFIG_NAME) | read_tensors(folder / WEIGHTS_NAME)
        try:
            return cls(**arguments)
        except (TypeError, ValueError) as error:
            raise ValueError(f"The head profile in {folder} is damaged: {error}") from error

    @classmethod
    def from_heatkv_orders(
        cls,
        path: str | Path,
        *,
        schedule: Schedule,
        head_dim: int,
        num_layers: int | None = None,
        num_heads: int | None = None,
        sinks: int = 3,
        family: str = "infinity",
        base_model: str | None = None,
        base_revision: str | None = None,
    ) -> "HeadProfile":
        """
        A profile from an order file of HeatKV, such as its authors published for Infinity. It serves that method only: it
        holds `mass`, made up from the ranks of the heads so that it gives these orders, and no other array.

        Args:
            path (`str` or `Path`):
                JSON list of a list for each source scale, of pairs `[head, layer]`, head first, those that lose the scale
                first at the beginning.
            schedule (`Schedule`):
                The scales that the file was made for.
            head_dim (`int`):
                Channels of a head.
            num_layers, num_heads (`int`, *optional*):
                Of the model. What the pairs reach to by default; then a file whose pairs are all swapped is not noticed.
            sinks (`int`, *optional*, defaults to 3):
                First scales, which the file has no lists for.
            family (`str`, *optional*, defaults to `"infinity"`):
                Backbone.
            base_model, base_revision (`str`, *optional*):
                Repository or name of the model, and commit of that repository.

        Raises:
            `ValueError`: if the number of lists is not that of the schedule, or a list is no permutation of all heads.
        """
        from .heatkv_orders import arguments_from_orders

        arguments = arguments_from_orders(path, schedule, sinks, num_layers, num_heads)
        return cls(**arguments, head_dim=head_dim, family=family, base_model=base_model, base_revision=base_revision)

    def save_heatkv_orders(self, path: str | Path, sinks: int = 3):
        """
        Write the order file of HeatKV that follows from `mass`, as the released scripts read it, and beside it the scores
        and how they were made, with the suffix `.scores.json`.

        Args:
            path (`str` or `Path`):
                File of the orders.
            sinks (`int`, *optional*, defaults to 3):
                First scales, which no head loses.

        Raises:
            `ValueError`: if the profile has no `mass`, or was read from orders with more sinks.
        """
        from .heatkv_orders import write_orders

        write_orders(self, self._config(), path, sinks)

    def _save_pretrained(self, save_directory: Path):
        save_file(self._tensors(), save_directory / WEIGHTS_NAME, metadata={"format": "pt"})
        text = json.dumps({"format_version": FORMAT_VERSION, **self._config()}, indent=2, ensure_ascii=False)
        # Short lists of numbers on one line each: the schedule alone would take fifty lines.
        text = re.sub(
            r"\[[\s\d.,-]*\]", lambda match: " ".join(match[0].split()).replace("[ ", "[").replace(" ]", "]"), text
        )
        (save_directory / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
        if self.has_types:
            self.head_map().save(save_directory / HEAD_MAP_NAME, optimize=True)

    def _config(self) -> dict[str, Any]:
        facts = {name: getattr(self, name) for name in FACTS}
        return {**facts, "schedule": [list(size) for size in self.schedule.sizes]}

    def _tensors(self) -> dict[str, torch.Tensor]:
        parts = {"mean": self.mean, "variance": self.variance}
        return {f"{part}.{name}": arrays[name] for part, arrays in parts.items() for name in sorted(arrays)}

    def _num_contextual(self, alpha: float) -> int:
        if not 0 <= alpha <= 1:
            raise ValueError(f"`alpha` must lie in [0, 1] but is {alpha}.")
        # The epsilon keeps products such as 0.145 * 100 = 14.499999999999998 at what they mean.
        return math.floor(alpha * self.num_layers * self.num_heads + 0.5 + 1e-9)


def checked_schedule(sizes: Any) -> Schedule:
    """The schedule of a list of sizes."""
    try:
        return Schedule(tuple((int(height), int(width)) for height, width in sizes))
    except TypeError as error:
        raise ValueError(f"`schedule` must be a list of heights and widths but is {sizes!r}.") from error


def checked_arrays(
    part: str, arrays: dict[str, torch.Tensor], shapes: dict[str, tuple[int, ...]]
) -> dict[str, torch.Tensor]:
    """The arrays in float32 on the CPU, after a look at their shapes and values."""
    result = {}
    for name, shape in shapes.items():
        tensor = arrays[name].detach().to("cpu", torch.float32).contiguous()
        if tensor.shape != shape:
            raise ValueError(f"`{part}.{name}` must be {shape}, as the model says, but is {tuple(tensor.shape)}.")
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"`{part}.{name}` has entries that are not finite. If the model's attention overflowed, calibrate it in "
                "bfloat16 or float32."
            )
        result[name] = tensor
    return result


def read_config(path: Path) -> dict[str, Any]:
    """`config.json` of a head profile without its format version, which must be ours."""
    if not path.is_file():
        raise ValueError(f"There is no head profile in {path.parent}: it has no {path.name}.")
    config = read_json(path)
    version = config.pop("format_version", None)
    if type(version) is not int:
        raise ValueError(f"{path} does not belong to a head profile: it has no `format_version`.")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path} is a head profile of format {version}, but this package reads formats up to {FORMAT_VERSION}: "
            "`pip install --upgrade hack_pipelines`."
        )
    missing, unknown = sorted(set(FACTS) - config.keys()), sorted(config.keys() - set(FACTS))
    if missing or unknown:
        raise ValueError(f"{path} is damaged: it lacks {missing or 'nothing'} and has unknown {unknown or 'nothing'}.")
    return config


def read_tensors(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Means and variances of `profile.safetensors`."""
    if not path.is_file():
        raise ValueError(f"The head profile in {path.parent} lacks its {path.name}; no other weight format is read.")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged ({error}): {DOWNLOAD_AGAIN}.") from error
    parts: dict[str, dict[str, torch.Tensor]] = {"mean": {}, "variance": {}}
    for name, tensor in tensors.items():
        part, _, array = name.partition(".")
        if part not in parts:
            raise ValueError(f"{path} holds {name!r}, which is no part of a head profile.")
        parts[part][array] = tensor
    return parts


def sizes_text(schedule: Schedule) -> str:
    """Sizes of a schedule in short, `1 2 4x3` for example."""
    return " ".join(str(height) if height == width else f"{height}x{width}" for height, width in schedule.sizes)
