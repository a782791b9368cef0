"""Flags as fields of frozen dataclasses: each is declared once, with type, default and help.

A command's parser is made from its dataclasses. What a command line *gives* is a dict of those
flags alone; the command resolves it to one configuration. Nothing here imports torch, so that a
wrong command line ends at once.
"""

import argparse
import ast
import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

from cifd_clip.names import did_you_mean, nearby, unknown_flag
from training.errors import UsageError

INSTALLED = Path(__file__).parents[2]  # where the packages are
ARGPARSE = ("choices", "metavar", "nargs", "action")  # what goes to it from a field's metadata
CONTROL = r"[\x00-\x1f\x7f]"
Given = dict[str, Any]  # flags of a command line, with underscores, by what it says of them


def flag(default: Any, help: str = "", **options: Any) -> Any:
    """A dataclass field that is a flag.

    Args:
        default: of the field; what ``--help`` shows, unless ``help`` ends in its own ``[...]``.
        help: one line.
        options: ``choices``, ``metavar``, ``nargs``, ``action`` of argparse; ``least`` (the value
            is at least this), ``above`` and ``below`` (strictly), which `check_ranges` checks;
            ``span``: the lowest and highest value that `training.tune` tries;
            ``lines``: whether it is text of several lines;
            ``free``: whether a resumed run may change it; ``moves``: whether it may be given in
            another way, because what it names is known by a hash.
    """
    metadata = {"help": help, **options}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def spelled(name: str) -> str:
    """A field's flag: ``batch_size`` → ``--batch-size``."""
    return f"--{name.replace('_', '-')}"


class KeyValues(argparse.Action):
    """``key=value ...`` with Python literals as values, as OpenCLIP's ``--aug-cfg``."""

    def __call__(self, parser, namespace, values, option_string=None):
        pairs = {}
        for item in values:
            key, sign, value = item.partition("=")
            if not sign:
                raise UsageError(f"{option_string} '{item}': expected key=value")
            try:
                literal = ast.literal_eval(value)
                # as JSON keeps it, so that a run and a cache find their own values again
                pairs[key] = list(literal) if isinstance(literal, tuple) else literal
            except (ValueError, SyntaxError):
                pairs[key] = value
        setattr(namespace, self.dest, pairs)


class Help(argparse.RawDescriptionHelpFormatter):
    """Short: a default is shown where there is one to show."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=36, width=100)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        keep = "\n" in text  # a docstring has its own lines
        return text if keep else argparse.HelpFormatter._fill_text(self, text, width, indent)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return {int: "N", float: "X"}.get(action.type, "NAME")

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        unset = (None, "", {}, [], argparse.SUPPRESS)
        if action.nargs == 0 or action.default in unset or text.endswith("]"):
            return text
        values = action.default if isinstance(action.default, list) else [action.default]
        return f"{text} [{' '.join(map(str, values))}]".strip().replace("%", "%%")


class HelpAll(argparse.Action):
    """``--help`` of every flag of a `Parser`."""

    def __call__(self, parser, namespace, values, option_string=None):
        parser.rare = set()
        parser.print_help()
        parser.exit()


class CommandLine(argparse.ArgumentParser):
    """A command line in this project's style, whose errors are `UsageError`.

    Args:
        module: what ``python -m`` runs.
        description: what it does; a docstring is read without its backticks.
        usage: its shape in a line.
    """

    def __init__(self, module: str, description: str, usage: str | None = None, **options: Any):
        super().__init__(
            prog=f"python -m {module}",
            description=description.replace("`", ""),
            usage=usage,
            formatter_class=Help,
            allow_abbrev=False,
            **options,
        )

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        """As argparse's; an unknown flag is answered with those it may stand for."""
        if unknown := unknown_flag(args, self._option_string_actions):
            self.error(f"unrecognized arguments: {unknown}")
        return super().parse_args(args, namespace)

    def error(self, message: str):
        if choice := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            message += did_you_mean(choice[1], re.findall(r"[\w.-]+", choice[2]))
        raise UsageError(f"{message} (see --help)")


class Parser(CommandLine):
    """The flags of dataclasses, of which only those that are given are read.

    Args:
        module, description, usage: see `CommandLine`.
        groups: (title, dataclass) of each group of flags.
        unsupported: reason → flags that are refused: OpenCLIP's that have no meaning here, and
            former ones, whose reason names the successor.
    """

    def __init__(
        self,
        module: str,
        description: str,
        usage: str,
        groups: Sequence[tuple[str, type]] = (),
        unsupported: Mapping[str, str] | None = None,
    ):
        super().__init__(module, description, usage, argument_default=argparse.SUPPRESS)
        self.unsupported, self.rare = unsupported or {}, set()
        for title, cls in groups:
            add_flags(self.add_argument_group(title), cls)

    def shorten(self, common: str) -> None:
        """Show these alone of the flags so far under ``--help``, and all under ``--help-all``.

        Args:
            common: flags' names, between blanks.
        """
        self.rare = {id(a) for a in self._actions if a.dest not in ["help", *common.split()]}
        self.add_argument("--help-all", action=HelpAll, nargs=0, help="show every flag")

    def format_help(self) -> str:
        rare = [action for action in self._actions if id(action) in self.rare]
        texts = [action.help for action in rare]
        for action in rare:
            action.help = argparse.SUPPRESS
        text = super().format_help()
        for action, full in zip(rare, texts):
            action.help = full
        return text

    def given(self, argv: Sequence[str]) -> Given:
        """The flags that a command line gives; of one given twice, the last.

        Raises:
            UsageError: a flag is unknown or not supported, or a value is wrong.
        """
        words = expand_files(argv)
        for word in words:
            name = word.partition("=")[0]
            for reason, names in self.unsupported.items():
                if name in names.split():
                    raise UsageError(f"{name} is not supported: {reason}")
        return vars(self.parse_args(words))


def add_flags(group, cls: type, besides: type | None = None) -> None:
    """Add the flags of a dataclass to a group of a parser, without those of the one it extends."""
    there = {f.name for f in fields(besides)} if besides else set()
    for f in fields(cls):
        if "help" in f.metadata and f.name not in there:
            group.add_argument(spelled(f.name), **_argument(f))


def _argument(f: Field) -> dict[str, Any]:
    """argparse's arguments of one flag, from the field's annotation and metadata."""
    kind = next((t for t in get_args(f.type) if t is not NoneType), f.type)
    if get_origin(f.type) is tuple:
        kind = f.type
    options = {k: f.metadata[k] for k in ARGPARSE if k in f.metadata}
    default = f.default if f.default is not MISSING else f.default_factory()
    text = f.metadata["help"]
    if default not in (None, "", False, (), {}) and not text.endswith("]"):
        shown = " ".join(f"{v:g}" for v in default) if isinstance(default, tuple) else default
        text = f"{text} [{shown}]".strip()
    options["help"] = text.replace("%", "%%")
    if kind is bool:
        options["action"] = "store_true" if default is False else argparse.BooleanOptionalAction
    elif get_origin(kind) is tuple:
        options.setdefault("nargs", "+")
        options["type"] = get_args(kind)[0]
    elif "action" not in options:
        options["type"] = kind
    return options


def construct(cls: type, values: Mapping[str, Any]) -> Any:
    """The dataclass of the values that are its fields; lists become tuples."""
    names = {f.name for f in fields(cls)}
    own = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in names}
    return cls(**own)


def check_ranges(config: Any) -> None:
    """Refuse values outside of the ranges that their fields state; not a number is outside.

    Text is one line, which logs, cards and tables may quote, unless its field has ``lines``.

    Raises:
        UsageError: names the flag and the value.
    """
    for f in fields(config):
        value = getattr(config, f.name)
        if isinstance(value, str) and not f.metadata.get("lines") and re.search(CONTROL, value):
            raise UsageError(f"{spelled(f.name)} {value!r} holds a line break or the like")
        values = value if isinstance(value, tuple) else (value,)
        if expected := _broken(f.metadata, [v for v in values if v is not None]):
            shown = " ".join(f"{v:g}" for v in values)
            raise UsageError(f"{spelled(f.name)} must be {expected}, got {shown}")


def _broken(limits: Mapping[str, Any], values: Iterable[float]) -> str | None:
    """What was expected of values that break a limit; None where they keep all."""
    least, above, below = (limits.get(name) for name in ("least", "above", "below"))
    parts = []
    if least is not None:
        parts.append("0 or more" if least == 0 else f"at least {least}")
    if above is not None:
        parts.append("positive" if above == 0 else f"above {above}")
    if below is not None:
        parts.append(f"below {below}")
    for value in values:
        if (
            (least is not None and not value >= least)
            or (above is not None and not value > above)
            or (below is not None and not value < below)
            or (parts and math.isinf(value))
        ):
            return " and ".join(parts) + (", and finite" if math.isinf(value) else "")
    return None


def line_words(line: str) -> list[str]:
    """The words of one line of a flag file, quoted as in a shell.

    A comment begins with ``#`` at the start of a word, as in a shell: ``name#1`` is a name.
    """
    lexer = shlex.shlex(line, posix=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    words = []
    try:
        while rest := line[lexer.instream.tell() :].lstrip():
            if rest.startswith("#"):
                break
            words.append(lexer.get_token())
    except ValueError as error:
        raise UsageError(f"flag file, line {line!r}: {error}") from error
    return words


def expand_files(words: Sequence[str], folder: Path | None = None) -> list[str]:
    """Words with the flags of each ``@file`` in its place.

    Args:
        words: of a command line or of a flag file.
        folder: of the flag file that they stand in: a file that it names is looked for there
            first, then in the working directory, and last where this package is installed, which
            brings `slurm/recipes`.

    Raises:
        UsageError: a file is missing, or names itself.
    """
    expanded: list[str] = []
    for word in words:
        if not re.match(r"@.", word):
            expanded.append(word)
            continue
        folders = [*([folder] if folder else []), Path(), INSTALLED]
        path = next((p for f in folders if (p := f / word[1:]).is_file()), None)
        if path is None:
            near = filter(None, (nearby(f / word[1:]) for f in folders))
            raise UsageError(f"{word}: no such flag file{next(near, '')}")
        try:
            lines = path.read_text("utf-8").splitlines()
            for line in lines:
                expanded += expand_files(line_words(line), path.parent)
        except RecursionError:
            raise UsageError(f"{word}: the flag file names itself") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{word}: can't be read: {error}") from error
    return expanded
