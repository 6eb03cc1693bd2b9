"""qdq_surgery: NVIDIA's QDQBERT recipe on any loaded Hugging Face encoder.

import qdq_surgery as qs

qmodel = qs.convert(model)
print(qs.diff(model, qmodel))
"""

# The first of all: the other imports take seconds, in which Ctrl-C may come.
from qdq_surgery.safety.interrupt import IS_COMMAND

# isort: split
from typing import TYPE_CHECKING

from qdq_surgery.version import __version__ as __version__

# The command imports what it runs when it knows what that is: its help is there before torch is.
if TYPE_CHECKING or not IS_COMMAND:
    from qdq_surgery.api import *  # noqa: F403
    from qdq_surgery.api import __all__ as __all__
