import sys

from bilevel.prepare.command import main
from bilevel.shell import to_reader

sys.exit(to_reader(main, sys.argv[1:]))
