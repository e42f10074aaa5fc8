"""torchrun, except that a signal gives its exit code (128 and the signal's number) and no traceback.

python -m bilevel.run.torchrun [torchrun's flags] SCRIPT [the script's flags]
"""

import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.run import main

if __name__ == "__main__":
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # under nohup: otherwise torchrun would handle it
        sys.argv.insert(1, "--signals_to_handle=SIGTERM,SIGINT,SIGQUIT")
    try:
        main()
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)
