"""``xbd image check``, with qemu-img's exit codes."""

from __future__ import annotations

from typing import Any, Final

import click

from xbd.cli.image.naming import NamedImage, parse_image
from xbd.cli.image.output import json_option, print_json, printable, progress_bar
from xbd.core.driver.image import CheckReport
from xbd.core.errors import XbdError

EXIT_NOT_CHECKED: Final = 1
EXIT_CORRUPT: Final = 2
EXIT_LEAKS: Final = 3
EXIT_NOTHING_TO_CHECK: Final = 63


class _WrongUse(click.UsageError):
    exit_code = EXIT_NOT_CHECKED


class _CheckCommand(click.Command):
    """A wrong use is a 1, too: 2 would tell of corruptions."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """As for every command."""
        try:
            return super().make_context(*args, **kwargs)
        except click.UsageError as error:
            failure = _WrongUse(error.message, error.ctx)
            raise failure from error


@click.command("check", cls=_CheckCommand)
@click.argument("image")
@click.option(
    "-r",
    "--repair",
    type=click.Choice(["leaks", "all"]),
    help="Mend leaks, or everything that can be mended.",
)
@json_option
@click.pass_context
def check(ctx: click.Context, image: str, repair: str | None, as_json: bool) -> None:
    """Look for damage in IMAGE.

    Ends with 0 if it is fine, 1 if it could not be checked, 2 if it is corrupt, 3 if it has leaks
    and nothing worse, 63 if images of its kind have nothing to check.
    """
    try:
        named = parse_image(image)
        if not named.can("check"):
            click.echo(f"xbd: {named}: {named.spec.driver} images have nothing to check", err=True)
            ctx.exit(EXIT_NOTHING_TO_CHECK)
        with progress_bar(f"checking {named}") as progress:
            report = named.format.check(named.path, repair=repair, progress=progress)
    except XbdError as error:
        click.echo(f"xbd: {error}", err=True)
        ctx.exit(EXIT_NOT_CHECKED)
    if as_json:
        print_json(_json(named, report))
    else:
        _print(report)
    ctx.exit(_exit_code(report))


def _exit_code(report: CheckReport) -> int:
    if report.errors:
        return EXIT_NOT_CHECKED
    if report.corruptions:
        return EXIT_CORRUPT
    return EXIT_LEAKS if report.leaks else 0


def _json(image: NamedImage, report: CheckReport) -> dict[str, Any]:
    told: dict[str, Any] = {
        "filename": str(image.path),
        "format": image.spec.driver,
        "check-errors": report.errors,
        "image-end-offset": report.image_end,
        "total-clusters": report.total_clusters,
        "allocated-clusters": report.allocated_clusters,
        "fragmented-clusters": report.fragmented_clusters,
        "compressed-clusters": report.compressed_clusters,
    }
    found = {
        "corruptions": report.corruptions,
        "leaks": report.leaks,
        "corruptions-fixed": report.corruptions_fixed,
        "leaks-fixed": report.leaks_fixed,
    }
    told |= {name: count for name, count in found.items() if count}
    return told | {"messages": list(report.messages)}


def _print(report: CheckReport) -> None:
    for message in report.messages:
        click.echo(printable(message))
    for count, what in (
        (report.corruptions_fixed, "corruptions were repaired"),
        (report.leaks_fixed, "leaked clusters were given back"),
        (report.corruptions, "errors: data may be damaged, or be damaged by further writes"),
        (report.leaks, "leaked clusters: they take space, and harm nothing else"),
        (report.errors, "places could not be read, and nothing is known of them"),
    ):
        if count:
            click.echo(f"{count} {what}.")
    if not (report.corruptions or report.leaks or report.errors):
        click.echo("No errors were found on the image.")
    if report.total_clusters:
        click.echo(
            f"{report.allocated_clusters}/{report.total_clusters} = "
            f"{_percent(report.allocated_clusters, report.total_clusters)} allocated, "
            f"{_percent(report.fragmented_clusters, report.allocated_clusters)} fragmented, "
            f"{_percent(report.compressed_clusters, report.allocated_clusters)} compressed clusters"
        )
    if report.image_end:
        click.echo(f"Image end offset: {report.image_end}")


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole if whole else 0:.2f}%"
