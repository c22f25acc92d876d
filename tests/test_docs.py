"""README and docs: every code block is run, or at least checked, and every link leads somewhere.

Comments above a block say how it is treated, see CONTRIBUTING.md.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from helpers import EMOJI_CHECKPOINT, ROOT, run_python
from packaging.requirements import Requirement
from parse_commands import run_imports
from PIL import Image

from metamorph_hf import MetaMorphProcessor
from metamorph_hf.data.formats import FAMILIES
from metamorph_hf.data.mixture import Source
from metamorph_hf.vpit.collator import DataCollatorForVPiT


PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md"))]
LINKING_PAGES = [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md"]
LINKING_PAGES += ["examples/emoji/README.md", "examples/findings/README.md"]
LANGUAGES = ("python", "bash", "yaml", "jsonl", "mermaid", "bibtex")
# Why a block is not run. Its scripts' parsers must accept their flags all the same, and its imports must work.
REASONS = {
    "hub": "it downloads from the Hub",
    "gpu": "it needs several devices",
    "data": "it needs files of the reader's own",
    "minutes": "it takes minutes; a test of its own runs the script with small sizes",
    "server": "it runs until it is stopped",
}


@dataclass
class Block:
    """A code block of a page: its language, the line it begins at, the heading above it, and the comments."""

    page: str
    line: int
    language: str
    heading: str
    comments: dict[str, str]
    code: str = ""

    def __str__(self) -> str:
        reason = f"-needs-{self.comments['needs']}" if "needs" in self.comments else ""
        return f"{self.page}:{self.line}{reason}"


def read_blocks(page: str) -> list[Block]:
    blocks, heading, comments, current = [], "", {}, None
    for number, line in enumerate((ROOT / page).read_text().splitlines(), start=1):
        if current is not None:
            if line == "```":
                current = None
            else:
                current.code += line + "\n"
        elif line.startswith("```"):
            current = Block(page, number + 1, line[3:], heading, comments)
            blocks.append(current)
            comments = {}
        elif match := re.fullmatch(r"<!-- ([a-z ]+): (.*) -->", line):
            comments[match[1]] = match[2]
        elif line:
            comments = {}
            if line.startswith("#"):
                heading = line.lstrip("# ")
    return blocks


BLOCKS = [block for page in PAGES for block in read_blocks(page)]


@dataclass
class Command:
    """A command of a bash block, as words, with the environment variables set before it."""

    block: Block
    words: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.block}-{' '.join(' '.join(self.words[:2]).split())[:60]}"

    def script(self) -> list[str] | None:
        """Return the script and its arguments, if the command runs one."""
        if self.words[0] == "python":
            return self.words[1:]
        if self.words[0] == "metamorph-hf":
            return ["-m", "metamorph_hf.cli", *self.words[1:]]
        if self.words[:2] == ["accelerate", "launch"]:
            launch, unknown = launch_command_parser().parse_known_args(self.words[2:])
            assert not unknown
            return [launch.training_script, *launch.training_script_args]
        return None


def split_commands(block: Block) -> Iterator[Command]:
    lexer = shlex.shlex(block.code.replace("\\\n", " "), posix=True, punctuation_chars="&\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
    command, in_comment = Command(block), False
    for word in lexer:
        ends_line = "\n" in word and not word.strip("&\n")
        in_comment = (in_comment or word.startswith("#")) and not ends_line
        if ends_line or word == "&&":
            if command.words:
                yield command
            command = Command(block)
        elif not command.words and re.fullmatch(r"[A-Z_]+=\S*", word):
            command.environment.update([word.split("=", 1)])
        elif not in_comment:
            command.words.append(word)
    if command.words:
        yield command


COMMANDS = [command for block in BLOCKS if block.language == "bash" for command in split_commands(block)]


def in_blocks(language: str):
    return pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == language], ids=str)


def prepare(folder: Path) -> None:
    """Make a folder look like the repository, with the files that pages tell readers to write."""
    for name in ("examples", "conversion"):
        (folder / name).symlink_to(ROOT / name)
    for block in BLOCKS:
        if "file" in block.comments:
            (folder / block.comments["file"]).write_text(block.code)


@pytest.fixture
def workplace(tmp_path, monkeypatch, video) -> Path:
    """The working directory of a page, with the images and the video that its rows name."""
    prepare(tmp_path)
    shutil.copy(video, tmp_path / "cat.mp4")
    Image.new("RGB", (64, 64), "white").save(tmp_path / "cat.png")
    Image.new("RGB", (64, 64), "black").save(tmp_path / "black_cat.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- Blocks ----


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_block_says_how_it_is_tested(block):
    assert block.language in LANGUAGES
    assert block.comments.keys() <= {"needs", "run with", "file"}
    assert "needs" not in block.comments or block.comments["needs"] in REASONS


RUN_PAGES = dict.fromkeys(block.page for block in BLOCKS if block.language in ("python", "bash"))


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN_PAGES)
def test_page_runs(page, workplace):
    """Run the blocks of a page in order: Python in one namespace, scripts in processes of their own."""
    namespace = {"__name__": "page"}
    for block in read_blocks(page):
        if "needs" in block.comments:
            continue
        if block.language == "python":
            code = "\n" * (block.line - 1) + block.code
            exec(compile(code, str(ROOT / page), "exec"), namespace)
        elif block.language == "bash":
            for command in split_commands(block):
                run_script(command)


def run_script(command: Command) -> None:
    script = command.script()
    if script is None:  # installs and tests are checked below
        return
    extra = shlex.split(command.block.comments.get("run with", ""))
    done = run_python([*script, *extra], Path.cwd(), command.environment, timeout=600)
    assert done.returncode == 0, f"{command}\n{done.stderr}"


PARSED_COMMANDS = [command for command in COMMANDS if "needs" in command.block.comments and command.script()]


@pytest.fixture(scope="module")
def parse_errors(tmp_path_factory) -> dict[str, str]:
    """The errors of the scripts' own parsers, by the command lines that are not run; empty if they are accepted."""
    folder = tmp_path_factory.mktemp("commands")
    prepare(folder)
    scripts = [command.script() for command in PARSED_COMMANDS]
    for script in scripts:
        if script[0].endswith("train_vpit.py"):  # configurations for GPUs are refused without one
            script += ["--use_cpu", "--bf16", "false"]
    parser = [sys.executable, str(ROOT / "tests" / "parse_commands.py")]
    done = subprocess.run(parser, input=json.dumps(scripts), cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    lines = [shlex.join(command.words) for command in PARSED_COMMANDS]
    return dict(zip(lines, json.loads(done.stdout), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("command", PARSED_COMMANDS, ids=str)
def test_script_accepts_its_flags(command, parse_errors):
    assert parse_errors[shlex.join(command.words)] == ""


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.words[0] == "accelerate"], ids=str)
def test_launcher_finds_its_configuration(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    launch = launch_command_parser().parse_args(command.words[2:])
    if launch.config_file is not None:
        load_config_from_file(launch.config_file)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.script() is None and c.words[0] != "curl"], ids=str)
def test_install_and_test_commands(command):
    project = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    extras = re.findall(r"^(\w+) = \[", project.partition("\n\n")[0], re.MULTILINE)
    if command.words[:2] == ["pip", "install"]:
        for word in command.words[2:]:
            if word.startswith("."):
                extra = word.strip(".[]")
                assert not extra or set(extra.split(",")) <= set(extras)
            else:
                Requirement(word)
    else:
        assert " ".join(command.words) in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "python" and "needs" in b.comments], ids=str)
def test_python_that_is_not_run(block):
    if block.comments["needs"] == "server":  # test_server.py runs these
        pytest.importorskip("openai", reason="openai is not installed")
    run_imports(block.code)


@in_blocks("yaml")
def test_yaml(block):
    content = yaml.safe_load(block.code)
    for source in content.get("mixture", []):
        Source.from_dict(source)


@in_blocks("jsonl")
def test_jsonl(block, workplace):
    """Each row of a task becomes a sample that the collator takes."""
    rows = [json.loads(line) for line in block.code.splitlines()]
    if block.page == "docs/data.md":
        processor = MetaMorphProcessor.from_pretrained(EMOJI_CHECKPOINT / "processor")
        source = Source(block.heading.strip("`"), block.comments["file"])
        records = [source.read(rows, index, seed=0) for index in range(len(rows))]
        batch = DataCollatorForVPiT(processor)(records)
        assert len(batch["labels"]) == len(rows) and (batch["labels"] != -100).any()


def test_every_task_has_a_smallest_row():
    shown = {block.heading.strip("`") for block in read_blocks("docs/data.md") if block.language == "jsonl"}
    assert shown == FAMILIES.keys()


@in_blocks("mermaid")
def test_diagram(block):
    """Every node has a label, and every arrow joins two nodes."""
    first, *edges = block.code.splitlines()
    assert re.fullmatch(r"flowchart (LR|TD)", first)
    nodes, used = set(), set()
    for edge in edges:
        ends = re.fullmatch(r'\s*(\w+)(\["[^"]+"\])? --(?: "[^"]+" --)?> (\w+)(\["[^"]+"\])?', edge)
        assert ends, edge
        used |= {ends[1], ends[3]}
        nodes |= {ends[1]} if ends[2] else set()
        nodes |= {ends[3]} if ends[4] else set()
    assert used == nodes


@in_blocks("bibtex")
def test_citation(block):
    """The two forms of the citation agree."""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]
    fields = dict(re.findall(r"(\w+)\s+= \{(.*?)\},?\n", block.code, re.DOTALL))
    assert (fields["title"], fields["year"], fields["journal"]) == (
        cited["title"],
        str(cited["year"]),
        cited["journal"],
    )
    names = [f"{author['family-names']}, {author['given-names']}" for author in cited["authors"]]
    assert re.split(r"\s+and\s+", fields["author"]) == names


# ---- The pages ----


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKING_PAGES)
def test_links(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("https://"):
            continue
        target, _, anchor = link.partition("#")
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), link
        assert not anchor or anchor in anchors(path), link


@pytest.mark.parametrize("page", LINKING_PAGES)
def test_tables_are_whole(page):
    """Wrapping a table like a paragraph joins its rows into one line."""
    for line in (ROOT / page).read_text().splitlines():
        assert not re.search(r"\S\s*\|\s*\|---", line), line[:100]


def test_readme():
    readme = (ROOT / "README.md").read_text()
    assert len(readme) <= 8000
    test_command = 'pip install ".[test]" && pytest -n 2 --dist loadscope'
    assert test_command in readme.splitlines()
    assert test_command in (ROOT / ".ci" / "run").read_text().splitlines()


@pytest.mark.parametrize("page", LINKING_PAGES)
def test_one_word_per_thing(page):
    """The glossary's words, in American spelling."""
    text = re.sub(r"```.*?```|`[^`]*`|<!--.*?-->", "", (ROOT / page).read_text(), flags=re.DOTALL)
    assert not re.findall(r"(?i)\b(?:pictures?|paint\w*|licence\w*|colour\w*|\w+normalis\w*|initialis\w*)\b", text)


def test_layout_in_contributing():
    """The layout names every module, and nothing else."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"^  (\w+\.py|\w+/) ", text, re.MULTILINE))
    package = ROOT / "src" / "metamorph_hf"
    modules = {path.name for path in package.glob("[!_]*.py")}
    assert named == modules | {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
