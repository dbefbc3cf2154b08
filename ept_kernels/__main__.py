"""``python -m ept_kernels``: see ``doctor``."""

import sys

from .doctor import main

sys.exit(main())
