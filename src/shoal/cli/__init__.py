"""The command line `shoal`. A verb parses, calls one public function and prints; none of it imports torch for `--help`.

Exit codes: 0 fine, 1 the user's program failed, 2 usage or configuration, 4 a checkpoint, 5 the environment.
"""

from __future__ import annotations

import typer

from shoal.cli import bench, checkpoint, doctor, run, verify

app = typer.Typer(
    name="shoal",
    help="Train one PyTorch model with many workers.",
    epilog="Exit codes: 0 fine, 1 your program failed, 2 usage or configuration, 4 a checkpoint, 5 the environment.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("run", context_settings={"allow_interspersed_args": False})(run.run)
app.command("verify", context_settings={"allow_interspersed_args": False})(verify.verify)
app.command("bench", context_settings={"allow_interspersed_args": False})(bench.bench)
app.command("doctor")(doctor.doctor)
app.add_typer(checkpoint.app, name="checkpoint")


def main() -> None:
    """Run the command that `sys.argv` names. Raises SystemExit with the exit code."""
    app()
