import sys

from bilevel.evaluate.command import main

sys.exit(main(sys.argv[1:]))
