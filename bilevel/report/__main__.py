import sys

from bilevel.report.command import main

sys.exit(main(sys.argv[1:]))
