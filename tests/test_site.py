"""The documentation's site: it builds without a warning, shows all that is exported, and leads nowhere else."""

import ast
import importlib.util
import os
import pkgutil
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest


for package in ("mkdocs", "material", "mkdocstrings_handlers.python"):
    pytest.importorskip(package, reason="the site is built with the extra `docs`: pip install -e '.[docs]'")

import griffe  # noqa: E402


ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "docs" / "reference"
# Attributes of elements that a browser loads by itself.
LOADED = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src", "video": "src"}


def load_hook(name):
    spec = importlib.util.spec_from_file_location(f"site_{name}", ROOT / "docs" / "hooks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pages = load_hook("pages")
docstrings = load_hook("docstrings")


def build(config, site):
    environment = {key: value for key, value in os.environ.items() if key not in ("REPOSITORY_URL", "SITE_URL")}
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--config-file",
        str(config),
        "--site-dir",
        str(site),
    ]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    result = build(ROOT / "mkdocs.yml", folder)
    assert result.returncode == 0, result.stderr
    return folder


class Elements(HTMLParser):
    """What a page has to be led to, where it leads to, and what it loads."""

    def __init__(self, path):
        super().__init__()
        self.anchors, self.links, self.loads = set(), set(), set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.anchors.update(attributes[name] for name in ("id", "name") if attributes.get(name))
        if tag == "a" and attributes.get("href"):
            self.links.add(attributes["href"])
        if (
            tag in LOADED
            and attributes.get(LOADED[tag])
            and attributes.get("rel") not in ("canonical", "prev", "next")
        ):
            self.loads.add(attributes[LOADED[tag]])


@pytest.fixture(scope="module")
def elements(site):
    # The page of a missing page is served at any depth, so its links start at the server's root.
    return {path: Elements(path) for path in site.rglob("*.html") if path.name != "404.html"}


def test_links_and_anchors_of_the_site_resolve(site, elements):
    broken = []
    for page, found in elements.items():
        for link in found.links | found.loads:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            if target.is_dir():
                target /= "index.html"
            anchor = unquote(parts.fragment)
            if not target.is_file() or anchor and target in elements and anchor not in elements[target].anchors:
                broken.append(f"{page.relative_to(site)}: {link}")
    assert not broken


def test_markdown_is_read_as_on_github(site):
    """Python-Markdown wants a line free before lists and tables, where GitHub does without."""
    left = []
    for page in site.rglob("*.html"):
        text = re.sub(r"<(pre|code|script|style)\b.*?</\1>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        paragraphs = "\n".join(re.findall(r"<(?:p|li)>(.*?)</(?:p|li)>", text, re.DOTALL))
        left += [
            (page.name, line) for line in paragraphs.splitlines() if re.match(r"\s*(?:[-*+] |\d+\. |\||#+ |```)", line)
        ]
    assert not left


def test_nothing_is_loaded_from_elsewhere(site, elements):
    loaded = {url for found in elements.values() for url in found.loads}
    assert "images/demo.png" in loaded
    assert not [url for url in loaded if urlsplit(url).netloc]
    for sheet in site.rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet


def test_pages_of_the_root_and_search_are_there(site, elements):
    assert "compressed per attention head" in (site / "index.html").read_text(encoding="utf-8")
    assert "reporting-results" in elements[site / "contributing.html"].anchors
    assert "HackVARPipeline.from_pretrained" in (site / "search" / "search_index.json").read_text(encoding="utf-8")


def test_what_leads_nowhere_fails_the_build(tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text("# Home\n\n[a](no-page.md), [b](index.md#no-anchor)\n")
    (docs / "no-entry.md").write_text("# More\n")
    config = tmp_path / "mkdocs.yml"
    parts = f"hooks: []\nplugins: []\nwatch: []\nextra_css: []\ntheme: {{custom_dir: {ROOT}/docs/theme}}"
    config.write_text(f"INHERIT: {ROOT}/mkdocs.yml\n{parts}\nnav: [index.md, no-file.md]\n")
    result = build(config, tmp_path / "site")
    assert result.returncode == 1
    # Whatever is in a warning fails a strict build by itself.
    warnings = re.findall(r"WARNING +-.*\n(?:  .*\n)*", result.stderr)
    for complaint in ("no-page.md", "#no-anchor", "no-entry.md", "no-file.md"):
        assert sum(complaint in warning for warning in warnings) == 1


def directives():
    names = [
        name for page in REFERENCE.glob("*.md") for name in pages.DIRECTIVE.findall(page.read_text(encoding="utf-8"))
    ]
    assert len(names) == len(set(names))
    return names


def exports():
    package = import_module("hack_pipelines")
    packages = [
        name for _, name, is_package in pkgutil.walk_packages(package.__path__, "hack_pipelines.") if is_package
    ]
    for module in ("hack_pipelines", *packages):
        yield from (
            f"{module}.{name}" for name in getattr(import_module(module), "__all__", ()) if name != "__version__"
        )


def imports():
    """What pages and examples import from the package."""
    code = [
        block
        for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
        for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    ]
    code += [path.read_text(encoding="utf-8") for path in (ROOT / "examples").glob("*.py")]
    for line in re.findall(r"^ *from hack_pipelines[.\w]* import [^#\n(]+", "\n".join(code), re.MULTILINE):
        statement = ast.parse(line.strip()).body[0]
        yield from (f"{statement.module}.{alias.name}" for alias in statement.names if alias.name != "__version__")


@pytest.mark.parametrize("wanted", [exports, imports])
def test_the_reference_is_complete(wanted):
    shown = {name.rpartition(".")[2]: pkgutil.resolve_name(name) for name in directives()}
    names = set(wanted())
    assert len(names) > 10
    missing = [name for name in names if shown.get(name.rpartition(".")[2]) is not pkgutil.resolve_name(name)]
    wanted_lines = ", ".join(f"`::: {name}`" for name in sorted(missing))
    assert not missing, f"add {wanted_lines} to the page of docs/reference/ that it belongs on"


@pytest.mark.parametrize(
    ("source", "markdown", "expected"),
    [
        ("README.md", "![all](docs/images/demo.png)", "![all](images/demo.png)"),
        ("README.md", "[a](docs/hub.md#open-a-model)", "[a](hub.md#open-a-model)"),
        ("docs/faq.md", "[rules](../CONTRIBUTING.md#tests)", "[rules](contributing.md#tests)"),
        ("docs/reference/cache.md", "[front](../../README.md)", "[front](../index.md)"),
        ("docs/faq.md", "[a](https://x.org/y.md) [b](#here)", "[a](https://x.org/y.md) [b](#here)"),
        ("docs/faq.md", "`[a](../README.md)`", "`[a](../README.md)`"),
        ("docs/faq.md", "```\n[a](../README.md)\n```", "```\n[a](../README.md)\n```"),
        ("docs/faq.md", "[a](../absent.py)", "[a](../absent.py)"),
        (
            "docs/faq.md",
            "[`CacheReport`](../src/hack_pipelines/cache/report.py)",
            "[`CacheReport`](reference/cache.md#hack_pipelines.CacheReport)",
        ),
        (
            "CONTRIBUTING.md",
            "[the method](src/hack_pipelines/methods/random.py)",
            "[the method](reference/methods.md#hack_pipelines.Random)",
        ),
        ("docs/writing-docs.md", "[a hook](hooks/pages.py)", "a hook (`docs/hooks/pages.py`)"),
        ("docs/hub.md", "[a server](../tests/hub_server.py)", "a server (`tests/hub_server.py`)"),
        ("docs/faq.md", "[`tests/hub_server.py`](../tests/hub_server.py)", "`tests/hub_server.py`"),
    ],
)
def test_links_that_leave_the_pages(source, markdown, expected):
    assert pages.rewrite(markdown, source, None) == expected


def test_links_lead_to_the_repository_where_there_is_one():
    url = "https://example.org/some/repo"
    link = "[`CacheReport`](../src/hack_pipelines/cache/report.py), [FAQ](faq.md)"
    expected = f"[`CacheReport`]({url}/blob/main/src/hack_pipelines/cache/report.py), [FAQ](faq.md)"
    assert pages.rewrite(link, "docs/hub.md", url + "/") == expected


MODULE = '''
class Shelf:
    """
    Holds things, see [`~Shelf.put`] and [`~torch.Tensor.to`].

    Args:
        width, max_depth (`int`, *optional*, defaults to 3):
            How large,
            in planks.
    """

    def __init__(self, width=3, max_depth=3): ...

    def put(self, thing, name=None):
        """
        Put a thing on it.

        Args:
            thing (`str` or `Shelf`):
                The thing.
            name (`str`, *optional*, defaults to `"thing"`):
                Its name.

        Returns:
            `int`: the place,
            `0` at the left.

        Raises:
            `ValueError`: if it is full.
            `KeyError`: if it is locked.
        """
'''


def described(code):
    with griffe.temporary_visited_package("cellar", {"__init__.py": code}) as package:
        docstrings.HuggingFaceDocstrings().on_package(pkg=package)
        return package


def test_docstrings_become_markdown(caplog):
    shelf = described(MODULE)["Shelf"]
    assert shelf.docstring.value == (
        "Holds things, see [`put`][cellar.Shelf.put] and `to`.\n\n**Parameters**\n\n"
        "- **width**, **max\\_depth** (`int`, *optional*, defaults to 3): How large,\n    in planks."
    )
    assert shelf["put"].docstring.value == (
        "Put a thing on it.\n\n**Parameters**\n\n"
        '- **thing** (`str` or <autoref optional identifier="cellar.Shelf"><code>Shelf</code></autoref>): The thing.\n'
        '- **name** (`str`, *optional*, defaults to `"thing"`): Its name.\n\n'
        "**Returns**\n\n- `int`: the place,\n    `0` at the left.\n\n"
        "**Raises**\n\n- `ValueError`: if it is full.\n- `KeyError`: if it is locked."
    )
    assert not caplog.records


@pytest.mark.parametrize(
    ("right", "wrong", "complaint"),
    [
        ("thing (`str`", "thong (`str`", "describes a parameter 'thong', which the signature lacks"),
        ("defaults to 3", "defaults to `4`", "'width' defaults to 3 but its description says 4"),
        ("~Shelf.put", "~Shelf.take", "mentions [`~Shelf.take`], which does not exist"),
        ("name (`str`, *optional*", "name [`str`, *optional*", "not a parameter in the form"),
        ("`int`: the place", "the place", "not an answer in the form"),
    ],
)
def test_docstrings_that_are_wrong_are_reported(caplog, right, wrong, complaint):
    assert right in MODULE
    described(MODULE.replace(right, wrong))
    assert complaint in caplog.text
