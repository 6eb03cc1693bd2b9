"""``python -m qdq_surgery``."""

import sys

from qdq_surgery.cli.commands import main

sys.exit(main())
