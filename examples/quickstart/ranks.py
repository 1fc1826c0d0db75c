"""Print how many processes the quickstart starts for a run, and the run's output directory.

    python examples/quickstart/ranks.py RUN.yaml [a.b=c ...]

The quickstart uses four processes, or as many as the layout needs; any remaining factor is data parallel.
"""

import sys

from dpo_engine.config.run import Config
from dpo_engine.errors import ConfigError

try:
    config = Config.load(sys.argv[1], sys.argv[2:])
except ConfigError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
needed = config.parallel.tp * config.parallel.pp * config.parallel.cp
print(max(1, 4 // needed) * needed, config.train.output_dir)
