"""`python -m server.control` runs a list of `flwr` commands, one after the other, in one interpreter.

Flower's command line takes 2 s to load and 0.04 s to use, so that registering a hundred keys one process each would
take minutes. The commands come on standard input as a JSON list of argument lists; the first that fails ends it.
"""

import json
import sys
from importlib.metadata import entry_points


def main() -> int:
    (script,) = entry_points(group="console_scripts", name="flwr")
    flwr = script.load()
    for arguments in json.load(sys.stdin):
        try:
            code = flwr(arguments, standalone_mode=False)
        except SystemExit as end:  # how some of its commands report an error
            code = end.code
        except Exception as error:  # whatever it is, the caller needs one line
            code = str(error) or repr(error)
        if code not in (None, 0):
            print(f"flwr {' '.join(arguments[:2])}: {code}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
