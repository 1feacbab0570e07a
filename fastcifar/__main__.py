"""``python -m fastcifar doctor | selftest``."""

import argparse
import sys

from .diagnosis import doctor, selftest


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fastcifar")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="versions, instruction set, GPU, and which kernel owns which op")
    commands.add_parser("selftest", help="check every op against its reference on this machine")
    if parser.parse_args().command == "doctor":
        print(doctor())
        return 0
    return 0 if selftest() else 1


if __name__ == "__main__":
    sys.exit(main())
