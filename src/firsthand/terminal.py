"""What the terminal shows: live progress while a study runs, and tables after. Plain text where it is piped."""

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from firsthand.catalogue import Card
from firsthand.harness.published import Evidence, primary

VERDICT_STYLE = {"reproduced": "green", "contradicted": "red", "inconclusive": "yellow"}
UNITS = {"wall_s": "wall s", "cpu_s": "CPU s", "peak_memory_mb": "peak MB"}


def number(value: float | None, signed: bool = False) -> str:
    """Four digits, or a dash for what is not known."""
    if value is None:
        return "-"
    return f"{value:{'+' if signed else ''}.4g}"


def cost_of(value: float | None) -> str:
    """Three digits, and none for next to nothing."""
    if value is None:
        return "-"
    return "<0.01" if value < 0.01 else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def count(value: float | None) -> str:
    """A parameter count in k, M or B."""
    if value is None:
        return "-"
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def verdict(evidence: Evidence | None, stale: bool = False) -> str:
    """A verdict in its colour, as rich markup."""
    if evidence is None:
        return "[dim]not measured[/]"
    outcome = primary(evidence)["verdict"]
    return f"[{VERDICT_STYLE[outcome]}]{outcome}[/]" + (" [dim](stale)[/]" if stale else "")


def effect(claim: Mapping[str, Any]) -> str:
    """The mean effect and its interval."""
    if claim["mean"] is None:
        return "-"
    low, high = claim["interval"]
    return f"{number(claim['mean'], signed=True)} [{number(low)}, {number(high)}]"


def catalogue_table(cards: Sequence[Card], evidence: Mapping[str, Evidence], stale: Mapping[str, bool]) -> Table:
    table = Table(box=None, pad_edge=False, expand=True)
    for column in ("method", "area", "verdict", "effect [95 % interval]", "what it is"):
        table.add_column(column, no_wrap=True, overflow="ellipsis", ratio=1 if column == "what it is" else None)
    for card in cards:
        found = evidence.get(card.slug)
        shown = escape(effect(primary(found))) if found else "-"
        about = verdict(found, stale.get(card.slug, False))
        table.add_row(card.slug, card.area, about, shown, escape(card.title))
    return table


def claims_table(evidence: Evidence) -> Table:
    table = Table(box=None, pad_edge=False, title="Claims (the first decides)", title_justify="left", title_style="bold")
    for column in ("claim", "claimed", "effect [95 % interval]", "p", "verdict"):
        table.add_column(column, overflow="fold")
    for claim in evidence["claims"]:
        outcome = claim["verdict"]
        reason = f" ({claim['reason']})" if claim["reason"] else ""
        table.add_row(
            escape(claim["text"]),
            claimed_range(claim),
            escape(effect(claim)),
            number(claim["p"]),
            f"[{VERDICT_STYLE[outcome]}]{outcome}[/]{escape(reason)}",
        )
    return table


def claimed_range(claim: Mapping[str, Any]) -> str:
    low, high = claim["low"], claim["high"]
    if high is None:
        return f"> {number(low)}"
    if low is None:
        return f"< {number(high)}"
    return f"{number(low)} to {number(high)}"


def effect_plot(claim: Mapping[str, Any], width: int = 48) -> str:
    """The effects as dots over their interval, on one scale with the ends of the claimed range. Empty if there is no interval."""
    effects = [value for value in claim["effects"].values() if value is not None]
    low, high = claim["interval"]
    if low is None or not effects:
        return ""
    ends = [end for end in (claim["low"], claim["high"]) if end is not None]
    left, right = min(*effects, low, *ends), max(*effects, high, *ends)
    scale = (width - 1) / (right - left) if right > left else 0.0

    def row(marks: Mapping[str, Sequence[float]], between: tuple[float, float] | None = None) -> str:
        cells = [" "] * width
        if between:
            start, stop = (round((value - left) * scale) for value in between)
            cells[start : stop + 1] = "─" * (stop + 1 - start)
        for mark, values in marks.items():
            for value in values:
                cells[round((value - left) * scale)] = mark
        return "  " + "".join(cells).rstrip()

    return "\n".join(
        (
            row({"╷": ends, "•": effects}) + "   each seed",
            row({"╵": ends, "├": [low], "┤": [high], "┼": [claim["mean"]]}, (low, high)) + "   95 % interval of the mean",
            f"  {number(left)}{number(right).rjust(width - len(number(left)))}"
            + "".join(f"   ╷ claimed edge {number(end)}" for end in ends),
        )
    )


def arms_table(evidence: Evidence) -> Table:
    """Means over seeds: the metrics that the claims are about, then the costs."""
    named = dict.fromkeys(metric for claim in evidence["claims"] for _, metric in claim["needs"])
    named |= dict.fromkeys(metric for of_arm in evidence["metrics"].values() for metric in of_arm)
    shown = list(named)[:3]
    sparse = any(costs["active_parameters"] != costs["parameters"] for costs in evidence["costs"].values())
    table = Table(box=None, pad_edge=False, title="Arms (means over seeds)", title_justify="left", title_style="bold")
    table.add_column("arm", overflow="fold")
    for column in (*shown, *UNITS.values(), "trained", *(["active"] if sparse else [])):
        table.add_column(column, justify="right", overflow="fold", min_width=6)
    for arm, costs in evidence["costs"].items():
        metrics = evidence["metrics"].get(arm, {})
        means = [_mean(list(metrics[name].values())) if name in metrics else None for name in shown]
        table.add_row(
            escape(arm),
            *map(number, means),
            *(cost_of(costs[cost]) for cost in UNITS),
            count(costs["trained_parameters"]),
            *([count(costs["active_parameters"])] if sparse else []),
        )
    return table


def show_evidence(console: Console, evidence: Evidence, verbose: bool = False) -> None:
    """Claims, arms, failures: what a run leaves on the screen."""
    console.print(f"\n[bold]{escape(evidence['question'] or evidence['method'])}[/]")
    seeds = evidence["seeds"]
    data = ", ".join(evidence["data"]) or "generated"
    console.print(f"[dim]equal: {escape(evidence['equal'])}; data: {data}; seeds {seeds[0]}-{seeds[-1]} ({len(seeds)})[/]\n")
    console.print(claims_table(evidence))
    console.print()
    if plot := effect_plot(primary(evidence)):
        console.print(f"[bold]Effect of the first claim[/]\n{plot}\n", highlight=False)
    console.print(arms_table(evidence))
    for failure in evidence["failures"]:
        console.print(f"[red]failed[/] {escape(failure['arm'])}, seed {failure['seed']}: {escape(failure['error'])}")
        if verbose and failure["traceback"]:
            console.print(escape(failure["traceback"]), style="dim", highlight=False)
    if evidence["failures"] and not verbose:
        console.print("[dim]--verbose shows the tracebacks[/]")
    if evidence["smoke"]:
        console.print("[yellow]smoke run: everything ran at tiny size; the numbers mean nothing[/]")


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


class Live:
    """Progress of a run, as the `tell` of `firsthand.run`: a bar an arm on a terminal, a line a trial elsewhere."""

    def __init__(self, console: Console, arms: Sequence[str], seeds: int) -> None:
        self.console, self.kept, self.ended, self.total = console, 0, 0, len(arms) * seeds
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f} seeds"),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[now]}[/]"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._bars: dict[str, TaskID] = {
            arm: self._progress.add_task(escape(arm), total=seeds, now="", start=False) for arm in arms
        }

    def __enter__(self) -> "Live":
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def __call__(self, told: object) -> None:
        from firsthand.harness.runner import At, Ended, Kept, Warned
        from firsthand.harness.worker import Progress as Stepped

        match told:
            case Warned(message):
                self.console.print(f"[yellow]warning[/] {escape(message)}", soft_wrap=True)
            case Kept(record):
                self.kept += 1
                self._progress.update(self._bars[record["arm"]], advance=1)
            case At(seed, event):
                where = f"seed {seed}"
                if isinstance(event, Stepped):
                    where += f" {event.label} {event.done}/{event.total or '?'}"
                for arm, bar in self._bars.items():
                    if event.arm in (arm, "prepare"):
                        self._progress.start_task(bar)
                        self._progress.update(bar, now=("prepare " if event.arm == "prepare" else "") + escape(where))
            case Ended(record) if record["arm"] in self._bars:
                self.ended += 1
                self._progress.update(self._bars[record["arm"]], advance=1, now="")
                failed = record["status"] != "ok"
                if failed or not self.console.is_terminal:
                    seconds = f"{record['costs']['wall_s']:.1f} s" if record["costs"] else ""
                    outcome = f"[red]failed[/] {escape(record['error'])}" if failed else "ok"
                    self.console.print(f"seed {record['seed']}  {escape(record['arm'])}  {outcome}  {seconds}", soft_wrap=True)
