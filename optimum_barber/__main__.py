"""`python -m optimum_barber` is `optimum-barber`."""

import sys

from .cli import main

sys.exit(main())
