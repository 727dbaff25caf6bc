"""What runs the pages has to find what is wrong in them: each test is a small page with one fault, or none."""

import sys
from pathlib import Path

import pytest

from hack_pipelines.methods import METHODS

from .outputs import same
from .pages import ROOT, PageError, check, parse
from .reader import Reader, is_slow


def page(folder: Path, text: str) -> Path:
    path = folder / "page.md"
    path.write_text(text)
    return path


def read(folder: Path, text: str, slow: bool = False):
    blocks = parse(page(folder, text))
    check(blocks)
    Reader(folder).read(blocks, slow)


@pytest.fixture(autouse=True)
def in_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


GOOD = """
A page.

```python
a = 2
```

- In a list, which is indented:

  ```python
  print(a + 1)
  ```

  ```text
  3
  ```

<!-- not run: costs money -->
```bash
exit 1
```

```bash
echo one > file
cat file && false  # the status of what follows is shown
hack-pipelines generate --prompts-file none.txt
```

```text
one
hack-pipelines: error: ...
```

```console
$ echo two
two
$ true
$ hack-pipelines --version
hack_pipelines 0.0.1
```

```python
raise ValueError("no such head")
```

```text
ValueError: no such head
```
"""


def test_good_page_is_read(tmp_path):
    read(tmp_path, GOOD)


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("  3\n", "  4\n", r"page.md:15: the output is not what the page shows(?s:.*)-4\n\+3"),
        ("one\nhack", "one\ntwo\nhack", r"page.md:30: the output is not what the page shows"),
        ("two\n$ true", "three\n$ true", r"page.md:35: the output is not what the page shows"),
        ("$ true\n", "$ true\nsomething\n", r"page.md:35: the output is not what the page shows"),
        ("$ true\n", "$ false\n", r"page.md:35: this console block fails(?s:.*)false\nexit status 1"),
        ("a = 2", "a = b", r"page.md:5: this python block fails(?s:.*)page.md\", line 5(?s:.*)NameError: name 'b'"),
        ("no such head\n```\n", "no head\n```\n", r"page.md:47: the output is not what the page shows"),
        ("```text\nValueError: no such head\n```\n", "", r"page.md:43: this python block fails"),
        ("<!-- not run: costs money -->", "", r"page.md:20: this bash block fails, and no output(?s:.*)exit status 1"),
        ("<!-- not run: costs money -->", "<!-- not run: -->", r"page.md:20: a mark says why"),
        ("costs money -->\n", "costs money -->\n\nAnd:\n\n", r"page.md:18: a mark stands right before the block"),
        ("exit 1", "exit 1\n```\n```text\nwhat is seen", r"page.md:23: output follows the block that makes it"),
        ("```python\na", "```\na", r"page.md:5: a block has a language"),
        ("```python\na", "```rust\na", r"page.md:5: 'rust' is not run here"),
        ("```python\na = 2", "```text\na = 2", r"page.md:5: output follows the block that makes it"),
        ("```console\n$ ", "```console\n", r"page.md:35: a console block begins with"),
        (
            "  ```python\n  print",
            "        ```python\n        print",
            r"page.md:10: a fence that Markdown does not see",
        ),
    ],
)
def test_fault_is_found(right, wrong, message, tmp_path):
    assert GOOD.count(right) == 1
    with pytest.raises(PageError, match=message):
        read(tmp_path, GOOD.replace(right, wrong))


PART = """
```bash
python examples/add_a_method.py --output results
```

<!-- from: examples/add_a_method.py -->
```python
def min_budget(self, geometry: Geometry, profile: "HeadProfile | None") -> int:
    return sum(geometry.schedule.lengths[: self.coarse]) + 1
```
"""


def test_part_of_a_file_is_compared_with_it(tmp_path):
    check(parse(page(tmp_path, PART)))
    for right, wrong, message in (
        ("+ 1", "+ 2", "page.md:8: these are not lines of examples/add_a_method.py"),
        ("from: examples/add", "from: examples/take", "page.md:8: there is no file 'examples/take_a_method.py'"),
        (
            "python examples/add_a_method.py",
            "ls",
            "page.md:8: neither a command of this page nor test_examples.py runs",
        ),
    ):
        with pytest.raises(PageError, match=message):
            check(parse(page(tmp_path, PART.replace(right, wrong))))


SLOW = """
```bash
echo before > file
```

```bash
echo made by hack-pipelines compare
```

```text
something else
```
"""


def test_slow_block_and_its_output_are_passed_over(tmp_path):
    assert [is_slow(block) for block in parse(page(tmp_path, SLOW))] == [False, True, False]
    read(tmp_path, SLOW)
    assert (tmp_path / "file").read_text() == "before\n"
    with pytest.raises(PageError, match="page.md:11: the output is not what the page shows"):
        read(tmp_path, SLOW, slow=True)


def test_page_leaves_nothing_behind(tmp_path):
    (tmp_path / "own_module.py").write_text("a = 1")
    (tmp_path / "script.py").write_text("import sys, own_module; print(sys.argv[1:])")
    text = "```python\nimport sys\nfrom hack_pipelines.methods import METHODS\nsys.path.append('x')\nMETHODS['x'] = 1\n```\n"
    path = list(sys.path)
    read(tmp_path, text + "\n```bash\npython script.py --a 'b c'\n```\n\n```text\n['--a', 'b c']\n```\n")
    assert "x" not in METHODS and sys.path == path and "own_module" not in sys.modules


def test_script_that_raises_is_a_block_that_fails(tmp_path):
    (tmp_path / "script.py").write_text("raise RuntimeError('no such model')")
    with pytest.raises(PageError, match="page.md:2: this bash block fails(?s:.*)exit status 1(?s:.*)no such model"):
        read(tmp_path, "```bash\npython script.py\n```\n")


def test_commands_write_into_copies_of_the_clone(tmp_path):
    read(tmp_path, "```bash\necho gone > benchmarks/README\nls examples/add_a_method.py\n```\n")
    assert (tmp_path / "benchmarks" / "README").exists() and not (ROOT / "benchmarks" / "README").exists()


@pytest.mark.parametrize(
    ("shown", "made"),
    [
        ("a\n...\nd", "a\nb\nc\nd"),
        ("a\n...\nd", "a\nd"),
        ("a, b...", "a, b and c"),
        ("draws in 0.5 s", "draws in 12.5 s"),
        (
            "kv_budget=0.5  77.0  1851.8  2.01x less  1.18x less  0.54",
            "kv_budget=0.5  77.0  1851.8  2.01x less  1.18x less  9.99",
        ),
        ("http://127.0.0.1:1/commit/" + 40 * "a", "http://127.0.0.1:2/commit/" + 40 * "b"),
        (
            "one\ntwo",
            "one\n\rLoading:   0%|      | 0/4 [00:00<?, ?it/s]\rLoading: 100%|####| 4/4 [00:00<00:00, 9it/s]\ntwo",
        ),
        ("  head_map.png    22,198 bytes", "  head_map.png    9,198 bytes"),
    ],
)
def test_what_may_differ(shown, made):
    assert same(shown, made)


@pytest.mark.parametrize(
    ("shown", "made"),
    [
        ("a\na", "a"),
        ("a", "a\nb"),
        ("...\nb", "a\nc"),
        ("0.35 MiB stored, 10.25 times less", "0.35 MiB stored, 10.24 times less"),
        ("draws in 0.5 seconds", "draws in 0.5 minutes"),
        (
            "kv_budget=0.5  77.0  1851.8  2.01x less  1.18x less  0.54",
            "kv_budget=0.5  77.0  1851.8  2.01x less  1.19x less  0.54",
        ),
        ("  profile.safetensors    43,976 bytes", "  profile.safetensors    43,977 bytes"),
        ("a..", "a.b"),
    ],
)
def test_what_may_not_differ(shown, made):
    assert not same(shown, made)
