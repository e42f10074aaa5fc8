"""What run_F2SA.sh asks about settings.

python -m bilevel.settings                        the names of all settings; refuses an environment (exit code 2)
                                                  in which one of them is mistyped
python -m bilevel.settings --reads FOLDER FLAGS   whether a run with these flags reads data in the folder: yes or no
"""

import os
import sys

from bilevel.errors import ConfigError
from bilevel.settings.command_line import load_settings
from bilevel.settings.fields import FIELDS, Settings
from bilevel.settings.other_names import meant_as_settings
from bilevel.shell import to_reader

LAUNCHER = {"data_dir", "prepare"}  # words of run_F2SA.sh itself


def main(argv: list[str]) -> int:
    """Run the command. Exit code: 0 done, 2 a mistake of the user."""
    if argv[:1] == ["--reads"]:
        print("yes" if reads(argv[1], argv[2:]) else "no")
        return 0
    given = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    if problems := meant_as_settings(given):
        print("error: environment variables that look like settings:", file=sys.stderr)
        print("".join(f"  - {problem}\n" for problem in problems), end="", file=sys.stderr)
        print("correct them, or unset those that are meant for something else", file=sys.stderr)
        return 2
    print("\n".join(FIELDS))
    return 0


def reads(folder: str, flags: list[str]) -> bool:
    """Whether a run with these flags reads data in the folder. Flags with a mistake read none: it is told later."""
    try:
        settings, _ = load_settings(flags)
    except ConfigError:
        return False
    return any(os.path.realpath(place).startswith(os.path.realpath(folder) + os.sep) for place in _places(settings))


def _places(settings: Settings) -> list[str]:
    """All entries of the data settings."""
    given = [settings.train_data, settings.val_data, settings.test_data]
    lists = [part.values() if isinstance(part, dict) else [part] for part in given]
    return [place for part in lists for entries in part for place in entries]


if __name__ == "__main__":
    sys.exit(to_reader(main, sys.argv[1:]))
