"""One picture drawn twice, with the full cache and with a budget, and what both cost."""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..cache.budget import TokenBytes, budget_tokens
from ..cache.storage import get_storage
from ..cli.demo import choose_entries
from ..cli.families import ClassFamily, family_of
from ..cli.options import seeded
from ..methods import DEFAULT_METHOD, METHODS, get_method


if TYPE_CHECKING:
    from PIL.Image import Image

    from ..cache.report import CacheReport
    from ..pipelines import HackVARPipeline


DEFAULT_BUDGET = 0.3
# Far more than a text encoder reads, and little enough that its tokenizer is not kept busy.
MAX_PROMPT_CHARACTERS = 2000


@dataclass(frozen=True)
class Drawing:
    """
    A picture and what it cost.

    Args:
        image (`PIL.Image.Image`):
            The picture.
        report ([`CacheReport`]):
            What its cache held.
        seconds (`float`):
            Wall time of the pipeline's call, from prompt to picture.
    """

    image: "Image"
    report: "CacheReport"
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """
    The same picture with the full cache and with a budget.

    Args:
        name (`str`):
            The prompt or class.
        seed (`int`):
            Of both pictures.
        full, compressed ([`Drawing`]):
            The two.
        kv_budget (`float`), method (`str`), kv_dtype (`str`, *optional*):
            What the second was drawn with.
        allowed_tokens, allowed_bytes (`int`):
            The budget in tokens a head, and in bytes as the method stores them.
        sizes (`tuple[tuple[int, int], ...]`):
            Height and width of every token map.
    """

    name: str
    seed: int
    full: Drawing
    compressed: Drawing
    kv_budget: float
    method: str
    kv_dtype: str | None
    allowed_tokens: int
    allowed_bytes: int
    sizes: tuple[tuple[int, int], ...]

    @property
    def total_tokens(self) -> int:
        """All tokens of the picture, which a budget is a fraction of."""
        return sum(height * width for height, width in self.sizes)


class SideBySide:
    """
    Draws comparisons with one model.

    Args:
        pipe ([`HackVARPipeline`]):
            The model.
    """

    def __init__(self, pipe: "HackVARPipeline"):
        self.pipe = pipe
        self.family = family_of(pipe)
        # Prompts or classes to begin with.
        self.examples = choose_entries(self.family)

    @property
    def classes(self) -> list[tuple[str, int]] | None:
        """Name and id of every class, of a class-conditional model."""
        if not isinstance(self.family, ClassFamily):
            return None
        # Some classes of ImageNet share their names.
        return [(f"{self.family.name(entry)} ({entry})", entry) for entry in range(self.family.num_classes)]

    def draw(self, entry: int | str, seed: int, **arguments: Any) -> Drawing:
        """One picture of a prompt or class; `arguments` are those of the pipeline's call."""
        start = time.perf_counter()
        output = self.family.pipe([entry], generator=seeded([seed]), **arguments)
        seconds = time.perf_counter() - start
        return Drawing(output.images[0], output.cache_report, seconds)

    def compare(
        self,
        entry: int | str,
        seed: int = 0,
        kv_budget: float = DEFAULT_BUDGET,
        method: str = DEFAULT_METHOD,
        kv_dtype: str | None = None,
    ) -> Comparison:
        """
        Draw a picture with a budget and with the full cache, one after the other.

        Args:
            entry (`int` or `str`):
                Prompt, or id or name of a class.
            seed (`int`, *optional*, defaults to 0):
                Of both pictures.
            kv_budget (`float`, *optional*, defaults to 0.3):
                Fraction of the full cache.
            method (`str`, *optional*, defaults to `"hack++"`):
                How tokens are chosen.
            kv_dtype (`"int8"`, *optional*):
                Storage type of the keys and values of the compressed picture.

        Returns:
            [`Comparison`]

        Raises:
            `ValueError`: if the prompt is empty or too long, there is no such class or method, or the method cannot work
                with the budget.
        """
        entry = self.checked(entry)
        # The compressed picture comes first: the pipeline refuses a budget before it draws.
        compressed = self.draw(entry, seed, kv_budget=kv_budget, method=method, kv_dtype=kv_dtype)
        full = self.draw(entry, seed)
        geometry, token_bytes = self.pipe.geometry(), self.token_bytes(method, kv_dtype)
        allowed = budget_tokens(kv_budget, geometry, token_bytes)
        return Comparison(
            name=self.family.name(entry),
            seed=seed,
            full=full,
            compressed=compressed,
            kv_budget=kv_budget,
            method=method,
            kv_dtype=kv_dtype,
            allowed_tokens=allowed,
            allowed_bytes=allowed * token_bytes.per_token(geometry),
            sizes=geometry.schedule.sizes,
        )

    def token_bytes(self, method: str, kv_dtype: str | None) -> TokenBytes:
        """What a stored token costs."""
        storage = get_storage(kv_dtype)
        return TokenBytes(
            rows_per_image=2 if self.pipe.prepare_settings().guided else 1,
            itemsize=storage.itemsize(self.pipe.transformer.dtype),
            metadata=storage.metadata_bytes + get_method(method).metadata_bytes,
        )

    def checked(self, entry: int | str) -> int | str:
        """
        An input as the pipeline takes it.

        Raises:
            `ValueError`: if the prompt is empty or too long, or there is no such class.
        """
        if isinstance(self.family, ClassFamily):
            return self.family.parse([str(entry)])[0]
        text = str(entry).strip()
        if not text:
            raise ValueError("The prompt is empty: say what to draw.")
        if len(text) > MAX_PROMPT_CHARACTERS:
            raise ValueError(
                f"The prompt has {len(text)} characters, but the page takes at most {MAX_PROMPT_CHARACTERS}: shorten it."
            )
        return text


def method_names() -> list[str]:
    """Methods to choose from, the default first."""
    return sorted(METHODS, key=lambda name: (name != DEFAULT_METHOD, name))
