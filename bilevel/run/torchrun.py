"""torchrun, except that a signal makes its exit code (128 and the signal's number) and no traceback.

python -m bilevel.run.torchrun [torchrun's flags] SCRIPT [the script's flags]
"""

import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.run import main

if __name__ == "__main__":
    try:
        main()
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)
