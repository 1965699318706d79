"""The ``byol-deploy`` program: registers the commands and turns errors into exit codes."""

from __future__ import annotations

import sys

import typer

from .. import __version__
from ..errors import ByolDeployError
from . import bench, demo, doctor, embed, evaluate, export, inspect, train, verify
from .output import emit_json, talk

app = typer.Typer(
    name="byol-deploy",
    help="Unlabelled images in, a small verified encoder out, that runs without PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

for _module, _command in (
    (demo, demo.demo),
    (train, train.train),
    (export, export.export),
    (verify, verify.verify),
    (bench, bench.bench),
    (embed, embed.embed),
    (evaluate, evaluate.evaluate),
    (inspect, inspect.inspect),
    (doctor, doctor.doctor),
):
    app.command()(_command)


def _show_version(value: bool) -> None:
    if value:
        print(f"byol-deploy {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def main() -> None:
    """Run the program. Exit codes are those of :mod:`byol_deploy.errors`; anything unforeseen keeps its trace (1)."""
    try:
        app()
    except ByolDeployError as error:
        if "--json" in sys.argv:
            emit_json({"error": {"type": type(error).__name__, "message": str(error), "exit_code": error.exit_code}})
        talk(f"byol-deploy: {error}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        talk("byol-deploy: interrupted")
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output left (`| head`): nothing is wrong, and Python must not complain at exit.
        sys.stderr.close()
        sys.exit(0)
