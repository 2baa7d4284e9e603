"""`python -m minirlhf.kernels [--cuda]` builds ahead, so that the first run need not wait: see `build.main`."""

import sys

from minirlhf.kernels.build import main

main(sys.argv[1:])
