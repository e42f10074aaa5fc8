import sys

from bilevel.export.command import main

sys.exit(main(sys.argv[1:]))
