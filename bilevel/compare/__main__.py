import sys

from bilevel.compare.command import main

sys.exit(main(sys.argv[1:]))
