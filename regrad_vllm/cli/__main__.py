"""`python -m regrad_vllm.cli`."""

import sys

from regrad_vllm.cli.main import main

sys.exit(main())
