"""Pages that lie outside `docs/`, and links that leave it: a hook of MkDocs, see `mkdocs.yml`."""

import posixpath
import re
from functools import lru_cache
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


ROOT = Path(__file__).resolve().parents[2]
DOCS = "docs/"
# As `exclude_docs` of mkdocs.yml says.
LEFT_OUT = ".py"
BRANCH = "main"
# Pages of the site that are files of the repository's root, which people read there.
ROOT_PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
DIRECTIVE = re.compile(r"^::: (\S+)$", re.MULTILINE)
# Fenced blocks and code in a line are passed over; what remains of the matches are links and pictures.
LINK = re.compile(
    r"(?P<code>^(?P<fence> *(?:```+|~~~+)).*?^(?P=fence) *$)"
    r"|(?P<picture>!?)\[(?P<text>(?:!\[[^\]]*\]\([^)]*\)|`[^`]*`|[^\[\]`])*)\]\((?P<target>[^)\s]+)\)"
    r"|(?P<ticks>`+)[^`].*?(?P=ticks)(?!`)",
    re.MULTILINE | re.DOTALL,
)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Name the folder of the pages only where there is a repository: MkDocs would warn of half an address."""
    if config.repo_url:
        config.edit_uri = f"edit/{BRANCH}/{DOCS}"
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the repository's root."""
    for source, page in ROOT_PAGES.items():
        file = File.generated(config, page, abs_src_path=str(ROOT / source))
        file.edit_uri = f"../{source}"
        files.append(file)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links that are right in the repository into links that are right on the site."""
    sources = {target: source for source, target in ROOT_PAGES.items()}
    return rewrite(markdown, sources.get(page.file.src_uri, DOCS + page.file.src_uri), config.repo_url)


def rewrite(markdown: str, source: str, repo_url: str | None) -> str:
    """
    A page with its links and pictures led to the site's pages, the repository, or the API reference.

    Args:
        markdown (`str`):
            The page.
        source (`str`):
            Its path in the repository.
        repo_url (`str`, *optional*):
            Where the repository is. Without it, a link to a module leads to the reference of what the module defines, and
            one to another file becomes text that names the path.
    """

    def replaced(match: re.Match) -> str:
        target = match["target"]
        if target is None or target.startswith(("#", "/")) or re.match(r"[a-z][a-z0-9+.-]*:", target):
            return match[0]
        path, mark, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        text = LINK.sub(replaced, match["text"])
        if (new := site_path(path, source)) is not None:
            return f"{match['picture']}[{text}]({new}{mark}{anchor})"
        if not (ROOT / path).exists():
            return match[0]  # MkDocs warns of it
        if repo_url:
            return f"{match['picture']}[{text}]({repo_url.rstrip('/')}/blob/{BRANCH}/{path}{mark}{anchor})"
        if (new := reference_of_modules().get(path)) is not None:
            return f"[{text}]({posixpath.relpath(new, posixpath.dirname(page_of(source)) or '.')})"
        return text if path in text else f"{text} (`{path}`)"

    return LINK.sub(replaced, markdown)


def page_of(source: str) -> str:
    """Where a file of the repository is on the site, from its root."""
    return ROOT_PAGES.get(source, source.removeprefix(DOCS))


def site_path(path: str, source: str) -> str | None:
    """The way from one file of the repository to another on the site, or `None` if the other one is not there."""
    if path not in ROOT_PAGES and (not path.startswith(DOCS) or path.endswith(LEFT_OUT)):
        return None
    return posixpath.relpath(page_of(path), posixpath.dirname(page_of(source)) or ".")


@lru_cache(maxsize=1)
def reference_of_modules() -> dict[str, str]:
    """By the path of a module, the place of the reference that has the first thing that it defines."""
    package = griffe.load("hack_pipelines", search_paths=[ROOT / "src"])
    places: dict[str, str] = {}
    for page in sorted((ROOT / DOCS / "reference").glob("*.md")):
        for name in DIRECTIVE.findall(page.read_text(encoding="utf-8")):
            item = package[name.removeprefix("hack_pipelines.")]
            module = item.filepath.relative_to(ROOT).as_posix()
            places.setdefault(module, f"reference/{page.name}#{name}")
    return places
