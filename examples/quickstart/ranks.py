"""Print the number of processes that the quickstart starts for a run, and the output directory of the run.

    python examples/quickstart/ranks.py RUN.yaml [a.b=c ...]

The quickstart starts as many copies of the model as fit into four processes, but at least one. If there are several
copies, the run uses data parallelism.
"""

import sys

from dpo_engine.config.run import Config
from dpo_engine.errors import ConfigError
from dpo_engine.platform.dims import ParallelDims

try:
    config = Config.load(sys.argv[1], sys.argv[2:])
except ConfigError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
needed = ParallelDims.fewest(config.parallel)
print(max(1, 4 // needed) * needed, config.train.output_dir)
