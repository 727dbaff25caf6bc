"""Docstrings in Hugging Face's form, made Markdown for the API reference: a griffe extension, see `mkdocs.yml`."""

import ast
import re
from collections.abc import Iterator
from textwrap import dedent, indent
from typing import Any

import griffe


TITLES = {"Args": "Parameters"} | {name: name for name in ("Returns", "Raises", "Yields", "Example", "Examples")}
SECTION = re.compile(rf"^({'|'.join(TITLES)}):\n", re.MULTILINE)
# `name, other (`type`, *optional*, defaults to `value`):`, or the name alone.
PARAMETER = re.compile(r"(?P<names>\*{0,2}\w+(?:, \*{0,2}\w+)*)(?: \((?P<type>.+)\))?:")
# `type`: text, or [`Type`] or `type`: text, or the type alone.
TYPE = r"\[?`[^`]+`\]?"
ANSWER = re.compile(rf"(?P<type>{TYPE}(?:(?:,| or) {TYPE})*(?:, \*optional\*)?)(?:: (?P<text>.*))?", re.DOTALL)
DEFAULT = re.compile(r"defaults to `([^`]+)`")
MENTION = re.compile(r"\[`(~?)([\w.]+)`\](?![\[(])")
CODE = re.compile(r"`([\w.]+)`")
FENCE = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
# A name below one of these is documented elsewhere.
OTHER_LIBRARIES = ("accelerate", "diffusers", "huggingface_hub", "torch", "transformers")

logger = griffe.get_logger(__name__)


class HuggingFaceDocstrings(griffe.Extension):
    """
    Makes Markdown of the docstrings of a package, and warns where one says what the code does not.

    Sections become lists, [`Name`] and a type in backticks become links, and a default that the docstring names has to be
    that of the signature.
    """

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """
        Rewrite every docstring of a package, once all of it is loaded.

        Args:
            pkg (`griffe.Module`):
                The package.
            kwargs:
                What else griffe hands to its extensions.
        """
        documented = [item for item in members(pkg) if item.docstring]
        links = Links(pkg)
        for item in documented:
            item.docstring.value = Docstring(item, links).markdown()


def members(parent: griffe.Object) -> Iterator[griffe.Object]:
    """An object and all that is defined in it."""
    yield parent
    for member in parent.members.values():
        if not member.is_alias:
            yield from members(member)


class Links:
    """
    Finds the object that a docstring mentions.

    Args:
        package (`griffe.Module`):
            Where to look.
    """

    def __init__(self, package: griffe.Module):
        self.package = package
        self.by_name: dict[str, list[griffe.Object]] = {}
        for item in members(package):
            if item.is_class or (item.parent is not None and item.parent.is_module and not item.is_module):
                self.by_name.setdefault(item.name, []).append(item)

    def find(self, name: str, near: griffe.Object) -> griffe.Object | None:
        """
        The object that a name means.

        Args:
            name (`str`):
                `Class`, `Class.method`, `function` or a path below the package.
            near (`griffe.Object`):
                Where it is mentioned: of several objects, that of the same module is meant, then the first one.
        """
        first, *rest = name.split(".")
        found = sorted(self.by_name.get(first, []), key=lambda item: item.module is not near.module)
        target = found[0] if found else self.package.members.get(first)
        for part in rest:
            target = target and target.all_members.get(part)
        if target is not None and target.is_alias:
            target = target.final_target
        return target


class Docstring:
    """
    One docstring.

    Args:
        owner (`griffe.Object`):
            What it describes.
        links (`Links`):
            The objects that it may mention.
    """

    def __init__(self, owner: griffe.Object, links: Links):
        self.owner = owner
        self.links = links

    def markdown(self) -> str:
        """All of it as Markdown."""
        text, *sections = SECTION.split(self.value())
        written = [text.rstrip()]
        for name, body in zip(sections[::2], sections[1::2], strict=True):
            block, _, rest = re.match(r"((?:(?:    .*)?\n)*(?:    .*)?)(\n*)(.*)", body, re.DOTALL).groups()
            written += [f"**{TITLES[name]}**", self.section(name, dedent(block).strip("\n")), rest.rstrip()]
        return self.linked("\n\n".join(part for part in written if part))

    def value(self) -> str:
        """The text, with the example that diffusers' `replace_example_docstring` puts in at run time."""
        text = self.owner.docstring.value
        for decorator in getattr(self.owner, "decorators", ()):
            if decorator.callable_path.endswith("replace_example_docstring"):
                example = self.owner.module[str(decorator.value.arguments[0])]
                example = dedent(ast.literal_eval(str(example.value)))
                text = re.sub(r"^Examples?:\n", lambda _: example.strip("\n") + "\n", text, flags=re.MULTILINE)
        return text

    def section(self, name: str, body: str) -> str:
        """The body of a section: a list of parameters or answers, or the text that it is."""
        if name.startswith("Example"):
            return body
        if name == "Args":
            return "\n".join(self.parameter(item) for item in re.split(r"\n+(?=\S)", body))
        # Several errors, but one thing returned, whose description may go on over lines that begin with code.
        items = re.split(rf"\n+(?={TYPE}: )", body) if name == "Raises" else [body]
        return "\n".join(self.answer(item) for item in items)

    def parameter(self, item: str) -> str:
        """A parameter, or several that share a description, as an item of a list."""
        head, _, text = item.partition("\n")
        match = PARAMETER.fullmatch(head)
        if match is None:
            self.warn(f"not a parameter in the form 'name (`type`):' but {head!r}")
            return bullet(item)
        names = match["names"].split(", ")
        self.check_signature(names, match["type"] or "")
        kind = f" ({self.type_links(match['type'])})" if match["type"] else ""
        return bullet(", ".join(f"**{name}**".replace("_", "\\_") for name in names) + f"{kind}: {dedent(text)}")

    def answer(self, item: str) -> str:
        """What is returned or raised, as an item of a list."""
        match = ANSWER.fullmatch(item)
        if match is None:
            self.warn(f"not an answer in the form '`type`: text' but {item!r}")
            return bullet(item)
        text = f": {match['text']}" if match["text"] else ""
        return bullet(self.type_links(match["type"]) + text)

    def check_signature(self, names: list[str], kind: str) -> None:
        """Warn if a parameter does not exist, or has another default than its description says."""
        known = parameters(self.owner)
        for name in (name.lstrip("*") for name in names):
            if name not in known:
                self.warn(f"describes a parameter {name!r}, which the signature lacks")
            elif (match := DEFAULT.search(kind)) and not same_value(match[1], known[name]):
                self.warn(f"{name!r} defaults to {known[name]} but its description says {match[1]}")

    def type_links(self, kind: str) -> str:
        """Types in backticks that are names of the package, as links where the reference shows them."""

        def link(match: re.Match) -> str:
            target = self.links.find(match[1], self.owner)
            if target is None or not target.is_class:
                return match[0]
            return f'<autoref optional identifier="{target.path}"><code>{match[1]}</code></autoref>'

        parts = re.split(r"(\[`[^`]+`\])", kind)
        return "".join(part if part.startswith("[") else CODE.sub(link, part) for part in parts)

    def linked(self, text: str) -> str:
        """The text with a link for every [`Name`]; `~` shows the last part of a name only."""

        def link(match: re.Match) -> str:
            short, name = match.groups()
            shown = f"`{name.split('.')[-1] if short else name}`"
            if name.split(".")[0] in OTHER_LIBRARIES:
                return shown
            target = self.links.find(name, self.owner)
            if target is None:
                self.warn(f"mentions [`{short}{name}`], which does not exist")
                return shown
            return f"[{shown}][{target.path}]"

        pieces = re.split(f"({FENCE.pattern})", text, flags=FENCE.flags)
        return "".join(part if FENCE.fullmatch(part) else MENTION.sub(link, part) for part in pieces)

    def warn(self, message: str) -> None:
        """A warning that names the place; it fails a strict build."""
        logger.warning(
            f"{self.owner.relative_filepath}:{self.owner.lineno}: docstring of {self.owner.path}: {message}"
        )


def bullet(text: str) -> str:
    """A text as an item of a list."""
    return "- " + indent(text, "    ").lstrip()


def parameters(owner: griffe.Object) -> dict[str, str | None]:
    """Defaults by name of what a function, or a class when it is made, takes; the fields of a named tuple, too."""
    taken = {item.name.lstrip("*"): item.default for item in owner.parameters}
    if owner.is_class and any(str(base) == "NamedTuple" for base in owner.bases):
        taken = {name: field.value for name, field in owner.attributes.items()}
    return {name: None if default is None else str(default) for name, default in taken.items()}


def same_value(described: str, default: str | None) -> bool:
    """
    Whether the default of a description is that of the signature, where both are literals. `None` in the signature may
    stand for the value that the description names.
    """
    if default in (None, "None"):
        return default is not None
    try:
        return ast.literal_eval(described) == ast.literal_eval(default)
    except (SyntaxError, ValueError):
        return True
