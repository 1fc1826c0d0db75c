"""Print how many processes the quickstart starts for a run, and the directory the run writes to.

    python examples/quickstart/ranks.py RUN.yaml [a.b=c ...]

Four processes, or as many as the layout needs; what a layout leaves over is data parallel.
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
