"""What a run says on the terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

console = Console(highlight=False)


def show_samples(title: str, rows: list[dict[str, Any]]) -> None:
    """Print responses as a table, one column a key."""
    if not rows:
        return
    table = Table(title=title, title_justify="left", show_lines=True)
    for key in rows[0]:
        table.add_column(key, overflow="fold", justify="right" if isinstance(rows[0][key], float) else "left")
    for row in rows:
        table.add_row(*(f"{v:.2f}" if isinstance(v, float) else Text(str(v).strip()) for v in row.values()))
    console.print(table)
