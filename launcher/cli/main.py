"""The command line: verbs, options, help, exit statuses. What the verbs do is in verbs.py.

Nothing heavy may be imported here: `launch --help` and shell completion pay for it.
"""

import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launcher.cli import cluster, verbs
from launcher.cli.options import BACKEND, GPUS, RUN, complete_run, wants
from launcher.cli.store import store
from launcher.errors import LaunchError, UserError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class Launch(click.Group):
    """A group whose default command is `run`: `launch RECIPE` is `launch run RECIPE`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        args = args or ["--help"]
        if args[0] not in self.commands and args[0] not in ("-h", "--help", "--version"):
            args = ["run", *args]
        return super().parse_args(ctx, args)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage("launch", "RECIPE [OPTIONS] [key=value ...]")
        formatter.write_usage("launch", "COMMAND ...", prefix="       ")

    def shell_complete(self, ctx: click.Context, incomplete: str) -> "list[CompletionItem]":
        from click.shell_completion import CompletionItem

        # Files first: click's bash script forgets what it was told before it was told of files.
        return [CompletionItem(incomplete, type="file"), *super().shell_complete(ctx, incomplete)]


@click.group(cls=Launch, context_settings=HELP)
@click.version_option(package_name="launch-detcore", prog_name="launch")
def cli() -> None:
    """Launch multi-GPU training from a recipe, and bring it back when it is preempted.

    \b
      launch recipes/yolof_r50_1x.yaml --gpus 8
      launch recipes/yolof_r50_1x.yaml --gpus 8 --dry-run     what would be run
      launch status                                           what runs, and the last 20
      launch logs last -f                                     what its window shows
      launch resume s3://bucket/prefix/USER/RECIPE/RUN        on any machine

    RUN is a name, the beginning of an id, or `last`. Exit status: 0 done, 1 the run failed, 2 the
    input was wrong. Options of a launch: launch run --help. Completion: eval "$(launch completion bash)".
    """


@cli.command(short_help="Launch a recipe (the word `run` may be left out).")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[key=value ...]")
@wants
@BACKEND
@click.option("--name", help="Name of the run. Default: the recipe's.")
@click.option("--follow", is_flag=True, help="Show the log until the end; Ctrl-C leaves the run alone.")
@click.option("--dry-run", is_flag=True, help="Show what would be run, on any machine; start nothing.")
@click.option("--freeze", is_flag=True, help="Print the resolved recipe, for bare torchrun; start nothing.")
@click.option("--json", "as_json", is_flag=True, help="The dry run as JSON.")
def run(recipe: Path, overrides: tuple[str, ...], **options: Any) -> int:
    """Launch RECIPE, with any of its keys set by key=value.

    \b
      launch recipes/yolof_r50_1x.yaml --gpus 4 train.schedule.optimizer.lr=0.06
      launch recipes/yolof_r50_1x.yaml --dry-run
      launch recipes/yolof_r50_1x.yaml --freeze > frozen.yaml
    """
    if not recipe.exists() and not recipe.suffix:
        _refuse_misspelt_verb(str(recipe))
    return verbs.run(recipe, overrides, **options)


def _refuse_misspelt_verb(word: str) -> None:
    import difflib

    near = difflib.get_close_matches(word, cli.commands, 1)
    if near:
        raise UserError(f"{word} is neither a verb nor a recipe; did you mean `launch {near[0]}`?")


@cli.command()
@click.argument("run", required=False, shell_complete=complete_run)
@click.option("--json", "as_json", is_flag=True, help="For programs; the keys stay as they are.")
@click.option("--watch", is_flag=True, help="Draw anew every second.")
@click.option("--all", "everything", is_flag=True, help="All runs, not only the last 20 ended ones.")
def status(run: str | None, as_json: bool, watch: bool, everything: bool) -> int:
    """Show what runs, or one RUN in detail."""
    return verbs.status(run, as_json, watch, everything)


@cli.command()
@RUN
@click.option("-f", "--follow", is_flag=True, help="Go on until the run has ended.")
@click.option("--rank", type=click.IntRange(0), help="One worker's own log, of the last attempt.")
def logs(run: str, follow: bool, rank: int | None) -> int:
    """Print the log of RUN."""
    return verbs.logs(run, follow, rank)


@cli.command()
@RUN
def attach(run: str) -> int:
    """Go to the window of RUN."""
    return verbs.attach(run)


@cli.command()
@RUN
def stop(run: str) -> int:
    """End RUN: it saves, and nothing of it stays."""
    return verbs.stop(run)


@cli.command()
@RUN
def preempt(run: str) -> int:
    """Preempt RUN: it saves, leaves, comes back.

    The same path as a cluster's signal takes. Returns when no process of the attempt is alive."""
    return verbs.preempt(run)


@cli.command()
@click.argument("run", required=False, metavar="RUN|URL", shell_complete=complete_run)
@GPUS
@click.option("--nodes", type=click.IntRange(1), help="Machines; default: the recipe's on Slurm, else 1.")
@BACKEND
@click.option("--follow", is_flag=True, help="Show the log and wait for the end.")
@click.option("--all", "everything", is_flag=True, help="All runs that were lost here: after a reboot, say.")
def resume(
    run: str | None, gpus: int | None, nodes: int | None, backend: str, follow: bool, everything: bool
) -> int:
    """Go on with a run that has ended or was lost.

    RUN is one of this disk; a URL is a run in a store, as `launch status RUN` shows it: it is brought here.
    """
    return verbs.resume(run, gpus, nodes, backend, follow, everything)


@cli.command()
@click.argument("run", metavar="RUN|URL", shell_complete=complete_run)
@click.option("--json", "as_json", is_flag=True, help="For programs; the keys stay as they are.")
def verify(run: str, as_json: bool) -> int:
    """Read every checkpoint of RUN again, here and in its store.

    Says what is broken and how, and what a resume would go on from; writes nothing. A URL is a run in a
    store, as `launch status RUN` shows it. Exit status 1: one is broken, or none can be resumed from.
    """
    from launcher.cli.verify import run as read_again

    return read_again(run, as_json)


@cli.command()
@RUN
@click.option("--store", is_flag=True, help="In the store too.")
def rm(run: str, store: bool) -> int:
    """Delete RUN from this disk; it must have ended."""
    return verbs.rm(run, store)


@cli.command()
@click.argument("recipes", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RECIPE...")
def validate(recipes: tuple[Path, ...]) -> int:
    """Check recipes; start nothing."""
    return verbs.validate(recipes)


@cli.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    verbs.schema()


@cli.command()
@click.argument("runs", nargs=-1, shell_complete=complete_run, metavar="[RUN...]")
def tensorboard(runs: tuple[str, ...]) -> int:
    """Start TensorBoard over runs.

    Over those that are named, or all that `launch status` lists; on 127.0.0.1 and a free port, with the ssh
    line for another machine.
    """
    from launcher.cli.tensorboard import serve as serve_boards

    return serve_boards(runs)


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a shell's completion.

    \b
      eval "$(launch completion bash)"     in ~/.bashrc
    """
    from click.shell_completion import get_completion_class

    made = get_completion_class(shell)
    assert made is not None
    click.echo(made(cli, {}, "launch", "_LAUNCH_COMPLETE").source())


for verb in (*cluster.VERBS, store):
    cli.add_command(verb)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: every LaunchError is one sentence on stderr and an exit status."""
    sys.exit(_main(argv))


def _settle_streams() -> None:
    """Whoever starts us may have closed them, or have a locale without our letters: neither is an error."""
    for stream, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # closed, and the next file opened would take its number
            os.dup2(os.open(os.devnull, os.O_RDWR), stream)
            os.set_inheritable(stream, True)
            setattr(sys, name, os.fdopen(stream, "w" if stream else "r", closefd=False))
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):
            output.reconfigure(errors="replace")


def _main(argv: Sequence[str] | None) -> int:
    _settle_streams()
    try:
        answer = cli.main(argv, prog_name="launch", standalone_mode=False, complete_var="_LAUNCH_COMPLETE")
        sys.stdout.flush()
        return answer if isinstance(answer, int) else 0
    except click.ClickException as error:
        error.show()
        return 2
    except LaunchError as error:
        click.echo(f"launch: {error.message}", err=True)
        if error.hint:
            click.echo(f"  {error.hint}", err=True)
        return error.exit_status
    except (click.Abort, KeyboardInterrupt):
        return 130
    except BrokenPipeError:  # `launch logs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a full disk, a folder that is not ours: the system's own words say it
        click.echo(f"launch: {error}", err=True)
        return 1
