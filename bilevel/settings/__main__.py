"""Print the names of all settings, for run_F2SA.sh; refuse an environment in which one of them is mistyped."""

import os
import sys

from bilevel.settings.fields import FIELDS
from bilevel.settings.other_names import meant_as_settings

LAUNCHER = {"data_dir", "prepare"}  # words of run_F2SA.sh itself

given = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
if problems := meant_as_settings(given):
    print("error: environment variables that look like settings:", file=sys.stderr)
    print("".join(f"  - {problem}\n" for problem in problems), end="", file=sys.stderr)
    print("correct them, or unset those that are meant for something else", file=sys.stderr)
    sys.exit(2)
print("\n".join(FIELDS))
