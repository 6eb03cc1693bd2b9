"""``python -m qdq_surgery``."""

import sys

from qdq_surgery.cli import main

sys.exit(main())
