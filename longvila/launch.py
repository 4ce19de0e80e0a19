"""torchrun, for processes that say themselves what went wrong: `python -m longvila.launch TORCHRUN_ARGUMENTS`.

torchrun ends a failed run with its own stack trace and a table of exit codes, some forty lines below the one that
matters. The ranks have printed their error already, as one line or as a traceback: only the exit status is kept.
"""

import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

if __name__ == "__main__":
    try:
        main()
    except ChildFailedError as error:
        sys.exit(f"{len(error.failures)} of the ranks failed; what they said stands above")
    except SignalException as error:
        sys.exit(f"told to stop ({error.sigval.name}), as the ranks were; what they said stands above")
