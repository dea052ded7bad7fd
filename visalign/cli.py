"""``visalign``: the command line. Each command is a few lines in ``cli_runs`` or ``cli_rewards`` and its work in ``visalign/commands``.

Errors a user can act on (a wrong configuration, a missing file, a full disk) end with one message and exit status 1 or 2;
``visalign --debug ...`` shows the traceback. Anything else is a bug and keeps its traceback.
"""

from visalign import cli_runs
from visalign.cli_app import app

from visalign import cli_rewards  # isort: skip - help lists commands in the order in which they are added

__all__ = ["app", "cli_rewards", "cli_runs", "main"]


def main() -> None:
    app(prog_name="visalign")


if __name__ == "__main__":
    main()
