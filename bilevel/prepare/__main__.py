import sys

from bilevel.prepare.command import main

sys.exit(main(sys.argv[1:]))
