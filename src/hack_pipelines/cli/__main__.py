"""`python -m hack_pipelines.cli`, for `accelerate launch -m` and places where the script is not on the path."""

import sys

from . import main


sys.exit(main())
