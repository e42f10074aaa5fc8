import sys

from bilevel.compare.command import main
from bilevel.shell import to_reader

sys.exit(to_reader(main, sys.argv[1:]))
