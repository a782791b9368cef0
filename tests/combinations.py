"""The table of docs/scaling.md as data: which features go together, and what comes of it."""

from pathlib import Path

DOCUMENT = Path(__file__).parent.parent / "docs" / "scaling.md"
ROWS = 8  # of the global batch
#: Flags of each feature, for one process that has the whole batch.
FEATURES = {
    "2 ranks": [],
    "accumulation": ["--batch-size", str(ROWS // 2), "--accum-freq", "2"],
    "bf16": ["--precision", "amp_bf16"],
    "checkpointing": ["--grad-checkpointing"],
    "compile": ["--torchcompile"],
    "EMA": ["--ema", "0.9"],
    "SyncBN": ["--use-bn-sync"],
}
RANKS = 2
#: The case in which two features meet.
BUSIEST = "cifd"


def table() -> dict[tuple[str, str], str]:
    """(row, column) → mark, of the cells that say something."""
    text = DOCUMENT.read_text().partition("## What goes with what")[2].partition("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    header = cells[0][1:]
    assert header == list(FEATURES), "the table's columns are the features"
    return {
        (row[0], column): mark for row in cells[2:] for column, mark in zip(header, row[1:]) if mark
    }


def case_and_flags(row: str, column: str) -> tuple[str, list[str]]:
    """What a cell runs on each process."""
    features = [name for name in (row, column) if name in FEATURES]
    case = row if row not in FEATURES else BUSIEST
    ranks = RANKS if "2 ranks" in features else 1
    flags = ["--batch-size", str(ROWS // ranks)]
    for name in features:
        flags += FEATURES[name]
    if ranks > 1 and "accumulation" in features:
        flags += ["--batch-size", str(ROWS // ranks // 2)]
    return case, flags
